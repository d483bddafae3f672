/* CUDA kernels of ms_deform_attn.h, for compute capability 7.5 and newer.
 *
 * A row is one (image, query, head). It belongs to 4 to 32 neighbouring lanes of one warp, each of which owns a vector of the
 * row's channels, so that the lanes of a row together read a cell as one contiguous piece. First the lanes share out the
 * samples of their row and leave cells and bilinear weights in shared memory; then each of them visits all of these samples.
 * Nothing is shared between warps, so warps never wait for each other.
 *
 * A block takes neighbouring queries of one head: they read much the same cells, which then come from the L1 cache. Blocks of
 * all heads of these queries are neighbours in the grid, because their locations and weights lie side by side in memory.
 */
#include "ms_deform_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern __shared__ __align__(16) unsigned char shared_memory[]; /* of each row in turn: the samples at hand */

namespace {

constexpr int THREADS = 256;
constexpr int WARP_LANES = 32;
constexpr int MIN_LANES = 4; /* of a row: sum_over_lanes leaves one sum to each of four lanes */
constexpr int CORNERS = 4;   /* up left, up right, down left, down right */
constexpr int AT_ONCE = 2;   /* samples whose loads are in flight together: 8 loads of 16 bytes fill half of 64 registers */
constexpr int ACCESS_BYTES = 16;
constexpr int64_t MAX_SIDE = 1 << 24; /* larger maps have no exact positions in float32 */
constexpr int64_t MAX_BLOCKS = INT32_MAX, MAX_IMAGES = 65535; /* the grid's two axes */
constexpr int64_t MAX_MAP_BYTES = UINT32_MAX - 1; /* of an image's value, so that distances in it fit 32 bits */
constexpr unsigned OUTSIDE = UINT32_MAX;
constexpr unsigned ALL_LANES = 0xffffffff;

/* The type of sums, locations, weights and gradients. */
template <class Stored> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };
template <class Stored> using Real = typename RealOf<Stored>::type;

/* Samples of a row that are in shared memory together. */
template <class R> constexpr int CHUNK = 64 / sizeof(R);

/* What the kernels need to know of the sizes. */
struct Shape {
    int64_t queries, map_size;           /* map_size: numbers of an image's value */
    int heads, channels, lanes, samples; /* samples: of a row */
    int row_bytes;                       /* shared memory of a row */
    int level_factor;                    /* sample * level_factor >> 16 is the sample's level */
    unsigned cell_bytes;                 /* from one cell to the next */
    int heights[MPFORMER_MAX_LEVELS], widths[MPFORMER_MAX_LEVELS];
    unsigned first_bytes[MPFORMER_MAX_LEVELS]; /* from the first cell of the first level to the first cell of this one */
};

/* The row of this thread, and its place in it. */
struct Row {
    int64_t index, image;
    int head, lane, lanes;
    bool exists; /* false behind the last query: such lanes go along, because shuffles need whole warps, but see no cells */
};

/* What one lane reads or writes at once, for its size in bytes. */
template <int BYTES> struct AccessOf;
template <> struct AccessOf<16> { using type = uint4; };
template <> struct AccessOf<8> { using type = uint2; };
template <> struct AccessOf<4> { using type = unsigned; };
template <> struct AccessOf<2> { using type = unsigned short; };
template <class Element, int WIDTH> struct alignas(sizeof(Element) * WIDTH) Vector {
    using Access = typename AccessOf<sizeof(Element) * WIDTH>::type;
    Element elements[WIDTH];
};

/* Read in place of cells outside: with a branch around each load instead, loads would wait for each other. */
__device__ const uint4 ZEROS = {0, 0, 0, 0};

/* The cells around a sample, as distances in bytes from the first cell of the head and image, or OUTSIDE of the level, and
 * their parts in the output row. */
template <class R> struct alignas(16) Sample {
    unsigned cells[CORNERS];
    R weights[CORNERS];
};

/* The cell up and left of a sample, which may be outside (-1), and how far the sample is from there, in [0, 1). */
template <class R> struct Position {
    int row, column;
    R down, right;
};

__device__ float widen(float stored) { return stored; }
__device__ double widen(double stored) { return stored; }
__device__ float widen(__half stored) { return __half2float(stored); }
__device__ float widen(__nv_bfloat16 stored) { return __bfloat162float(stored); }

__device__ void narrow(float real, float &stored) { stored = real; }
__device__ void narrow(double real, double &stored) { stored = real; }
__device__ void narrow(float real, __half &stored) { stored = __float2half_rn(real); }
__device__ void narrow(float real, __nv_bfloat16 &stored) { stored = __float2bfloat16_rn(real); }

/* Without fusing: the product rounds a location that was meant to be at a cell's centre back to the centre. */
__device__ float cell_position(float location, int side) { return __fadd_rn(__fmul_rn(location, (float)side), -0.5f); }
__device__ double cell_position(double location, int side) { return __dadd_rn(__dmul_rn(location, (double)side), -0.5); }

/* ------------------------------------------------------------------------------------------------------------- samples */

template <int LANES> __device__ Row find_row(const Shape &shape)
{
    Row row;
    row.lanes = LANES ? LANES : shape.lanes;
    row.lane = threadIdx.x % row.lanes;
    row.image = blockIdx.y;
    const unsigned tile = blockIdx.x / shape.heads;
    row.head = blockIdx.x - tile * shape.heads;
    const int64_t query = (int64_t)tile * (THREADS / row.lanes) + threadIdx.x / row.lanes;
    row.exists = query < shape.queries;
    row.index = (row.image * shape.queries + query) * shape.heads + row.head;
    return row;
}

/* False if no corner is inside of the level. */
template <class R> __device__ bool locate(Position<R> &position, const R *location, int height, int width)
{
    const R x = cell_position(location[0], width), y = cell_position(location[1], height);
    if (!(x >= -1 && y >= -1 && x < width && y < height)) /* written so that NaN is outside */
        return false;
    const R column = floor(x), row = floor(y);
    position = {(int)row, (int)column, y - row, x - column};
    return true;
}

template <class R>
__device__ Sample<R> make_sample(const Shape &shape, int index, const R *__restrict__ locations, const R *__restrict__ weights)
{
    const int level = index * shape.level_factor >> 16;
    const int height = shape.heights[level], width = shape.widths[level];
    const R *location = locations + 2 * index;
    const R weight = weights[index];
    Position<R> at;
    if (!locate(at, location, height, width)) {
        /* Zero, or NaN if one of these is not finite: then zero, which is what is read outside, times this spoils the row. */
        const R poison = (location[0] - location[0]) + (location[1] - location[1]) + (weight - weight);
        return {{OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE}, {poison, poison, poison, poison}};
    }
    const bool is_up = at.row >= 0, is_down = at.row + 1 < height, is_left = at.column >= 0, is_right = at.column + 1 < width;
    const unsigned right = shape.cell_bytes, below = width * shape.cell_bytes; /* distances between cells */
    const unsigned cell = shape.first_bytes[level] + at.row * below + at.column * right;
    const R down = weight * at.down, up = weight - down, left = 1 - at.right;
    Sample<R> sample;
    sample.cells[0] = is_up && is_left ? cell : OUTSIDE;
    sample.cells[1] = is_up && is_right ? cell + right : OUTSIDE;
    sample.cells[2] = is_down && is_left ? cell + below : OUTSIDE;
    sample.cells[3] = is_down && is_right ? cell + below + right : OUTSIDE;
    sample.weights[0] = is_up && is_left ? up * left : 0;
    sample.weights[1] = is_up && is_right ? up * at.right : 0;
    sample.weights[2] = is_down && is_left ? down * left : 0;
    sample.weights[3] = is_down && is_right ? down * at.right : 0;
    return sample;
}

/* Put up to CHUNK samples of the row, from `first` on, into shared memory, and samples of nothing until their number is a
 * multiple of AT_ONCE. Returns this number. `locations` and `weights` are the row's. */
template <class R>
__device__ int list_samples(Sample<R> *samples, const Shape &shape, const Row &row, int first, const R *__restrict__ locations,
                            const R *__restrict__ weights)
{
    const int left = shape.samples - first;
    const int count = ((left < CHUNK<R> ? left : CHUNK<R>) + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    __syncwarp(); /* the samples before these have been read */
    for (int i = row.lane; i < count; i += row.lanes) {
        if (row.exists && i < left)
            samples[i] = make_sample(shape, first + i, locations, weights);
        else
            samples[i] = {{OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE}, {0, 0, 0, 0}};
    }
    __syncwarp();
    return count;
}

template <class R> __device__ Sample<R> *samples_of_row(const Shape &shape, const Row &row)
{
    return reinterpret_cast<Sample<R> *>(shared_memory + threadIdx.x / row.lanes * shape.row_bytes);
}

template <int WIDTH, class Stored> __device__ Vector<Stored, WIDTH> load(const Stored *stored)
{
    using Access = typename Vector<Stored, WIDTH>::Access;
    const Access access = __ldg(reinterpret_cast<const Access *>(stored));
    Vector<Stored, WIDTH> vector;
    memcpy(&vector, &access, sizeof access);
    return vector;
}

template <int WIDTH, class Stored> __device__ void widen(Real<Stored> (&reals)[WIDTH], const Vector<Stored, WIDTH> &vector)
{
    for (int k = 0; k < WIDTH; k++)
        reals[k] = widen(vector.elements[k]);
}

/* A bfloat16 is the upper half of a float: for two of them in a word that is one instruction each. */
template <int WIDTH> __device__ void widen(float (&reals)[WIDTH], const Vector<__nv_bfloat16, WIDTH> &vector)
{
    if constexpr (WIDTH == 1) {
        reals[0] = widen(vector.elements[0]);
    } else {
        unsigned words[WIDTH / 2];
        memcpy(words, &vector, sizeof words);
        for (int k = 0; k < WIDTH; k++)
            reals[k] = __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000 : words[k / 2] << 16);
    }
}

template <int WIDTH, class Stored> __device__ void store(Stored *stored, const Vector<Stored, WIDTH> &vector)
{
    using Access = typename Vector<Stored, WIDTH>::Access;
    Access access;
    memcpy(&access, &vector, sizeof access);
    __stcs(reinterpret_cast<Access *>(stored), access); /* nobody reads it here: keep the cache for `value` */
}

/* Read the corners of AT_ONCE samples, as zeros outside. All loads come before the first use of any. */
template <int WIDTH, class Stored>
__device__ void load_corners(Vector<Stored, WIDTH> (&vectors)[AT_ONCE][CORNERS], const Sample<Real<Stored>> (&samples)[AT_ONCE],
                             const Stored *map, bool is_inside)
{
    for (int i = 0; i < AT_ONCE; i++)
        for (int corner = 0; corner < CORNERS; corner++) {
            const unsigned cell = samples[i].cells[corner];
            const char *inside = reinterpret_cast<const char *>(map) + cell, *outside = reinterpret_cast<const char *>(&ZEROS);
            vectors[i][corner] = load<WIDTH>(reinterpret_cast<const Stored *>(is_inside && cell != OUTSIDE ? inside : outside));
        }
}

/* ------------------------------------------------------------------------------------------------------------- forward */

/* WIDTH channels a lane. LANES is known at compile time if the row has LANES * WIDTH channels, else 0; then the lanes pass over
 * the row's channels as often as it takes. The launch bounds, here and below, give as many registers as loads in flight need;
 * left alone, the compiler saves registers and lets loads wait for each other. */
template <class Stored, int WIDTH, int LANES>
__global__ void __launch_bounds__(THREADS, LANES ? 4 : 3)
    run_forward(const __grid_constant__ Shape shape, const Stored *__restrict__ value,
                const Real<Stored> *__restrict__ locations, const Real<Stored> *__restrict__ weights,
                Stored *__restrict__ output)
{
    using R = Real<Stored>;
    const Row row = find_row<LANES>(shape);
    Sample<R> *samples = samples_of_row<R>(shape, row);
    const int channels = LANES ? LANES * WIDTH : shape.channels;
    value += row.image * shape.map_size + row.head * channels;
    locations += row.index * shape.samples * 2, weights += row.index * shape.samples;
    for (int start = 0; start < channels; start += row.lanes * WIDTH) {
        const int channel = start + row.lane * WIDTH;
        const bool is_inside = LANES || channel < channels;
        R sums[WIDTH] = {};
        for (int first = 0; first < shape.samples; first += CHUNK<R>) {
            const int count = list_samples(samples, shape, row, first, locations, weights);
#pragma unroll 1
            for (int i = 0; i < count; i += AT_ONCE) {
                Sample<R> pair[AT_ONCE];
                Vector<Stored, WIDTH> vectors[AT_ONCE][CORNERS];
                for (int j = 0; j < AT_ONCE; j++)
                    pair[j] = samples[i + j];
                load_corners(vectors, pair, value + channel, is_inside);
                for (int j = 0; j < AT_ONCE * CORNERS; j++) {
                    R reals[WIDTH];
                    widen(reals, vectors[j / CORNERS][j % CORNERS]);
                    for (int k = 0; k < WIDTH; k++)
                        sums[k] += pair[j / CORNERS].weights[j % CORNERS] * reals[k];
                }
            }
        }
        if (row.exists && is_inside) {
            Vector<Stored, WIDTH> narrowed;
            for (int k = 0; k < WIDTH; k++)
                narrow(sums[k], narrowed.elements[k]);
            store(output + row.index * channels + channel, narrowed);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------ backward */

/* Numbers that one atomic operation adds. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <class R, int WIDTH> constexpr int ADDED = sizeof(R) == 8 ? 1 : WIDTH < 4 ? WIDTH : 4;
__device__ void add(float *sums, const float (&numbers)[4])
{
    atomicAdd(reinterpret_cast<float4 *>(sums), make_float4(numbers[0], numbers[1], numbers[2], numbers[3]));
}
__device__ void add(float *sums, const float (&numbers)[2])
{
    atomicAdd(reinterpret_cast<float2 *>(sums), make_float2(numbers[0], numbers[1]));
}
#else
template <class R, int WIDTH> constexpr int ADDED = 1;
#endif
template <class R> __device__ void add(R *sum, const R (&number)[1]) { atomicAdd(sum, number[0]); }

/* A lane's part of the gradient of the output row: the channels that it reads of the cells, and those that it adds to the
 * gradient of the cells. The latter are dealt out so that with each atomic instruction neighbouring lanes reach neighbouring
 * numbers: memory is charged for the sectors that an instruction touches. */
template <class Stored, int WIDTH> struct Gradient {
    using R = Real<Stored>;
    static constexpr int PER_ADD = ADDED<R, WIDTH>, ADDS = WIDTH / PER_ADD;
    R read[WIDTH], added[ADDS][PER_ADD];
    int read_channel, channels;

    __device__ int added_channel(int i, const Row &row) const
    {
        return read_channel + (i * row.lanes + row.lane) * PER_ADD - row.lane * WIDTH;
    }

    /* `grad_output` is the row's. */
    __device__ void fetch(const Stored *__restrict__ grad_output, const Row &row, int start, int num_channels)
    {
        read_channel = start + row.lane * WIDTH, channels = num_channels;
        Vector<Stored, WIDTH> vector = {};
        if (row.exists && read_channel < channels)
            vector = load<WIDTH>(grad_output + read_channel);
        widen(read, vector);
        for (int i = 0; i < ADDS; i++) {
            Vector<Stored, PER_ADD> piece = {};
            if (row.exists && added_channel(i, row) < channels)
                piece = load<PER_ADD>(grad_output + added_channel(i, row));
            widen(added[i], piece);
        }
    }

    /* Add the scalar products with the corners of AT_ONCE samples to `products`. */
    __device__ void multiply(R (&products)[AT_ONCE][CORNERS], const Sample<R> (&samples)[AT_ONCE], const Stored *map) const
    {
        Vector<Stored, WIDTH> vectors[AT_ONCE][CORNERS];
        load_corners(vectors, samples, map + read_channel, read_channel < channels);
        for (int j = 0; j < AT_ONCE * CORNERS; j++) {
            R reals[WIDTH];
            widen(reals, vectors[j / CORNERS][j % CORNERS]);
            for (int k = 0; k < WIDTH; k++)
                products[j / CORNERS][j % CORNERS] += read[k] * reals[k];
        }
    }

    /* Add this gradient to those of the corners. */
    __device__ void spread(R *__restrict__ grad_map, const Sample<R> &sample, const Row &row) const
    {
        for (int corner = 0; corner < CORNERS; corner++) {
            const R weight = sample.weights[corner];
            if (sample.cells[corner] == OUTSIDE || weight == 0)
                continue;
            /* Cells are named by distances in the value, whose numbers may be smaller than those of its gradient. */
            R *grad_cell = reinterpret_cast<R *>(reinterpret_cast<char *>(grad_map) +
                                                 (size_t)sample.cells[corner] * (sizeof(R) / sizeof(Stored)));
            for (int i = 0; i < ADDS; i++) {
                R numbers[PER_ADD];
                for (int k = 0; k < PER_ADD; k++)
                    numbers[k] = weight * added[i][k];
                if (added_channel(i, row) < channels)
                    add(grad_cell + added_channel(i, row), numbers);
            }
        }
    }
};

/* Sum each of four numbers over the lanes of a row. Lanes trade numbers while they add, so that each quarter of the lanes is
 * left with one sum, number lane / (lanes / 4): four shuffles for 8 lanes, where four separate sums would take twelve. */
template <class R> __device__ R sum_over_lanes(const R (&numbers)[CORNERS], const Row &row)
{
    const bool is_second_half = row.lane & row.lanes / 2, is_odd_quarter = row.lane & row.lanes / 4;
    R even = is_second_half ? numbers[2] : numbers[0], odd = is_second_half ? numbers[3] : numbers[1];
    even += __shfl_xor_sync(ALL_LANES, is_second_half ? numbers[0] : numbers[2], row.lanes / 2);
    odd += __shfl_xor_sync(ALL_LANES, is_second_half ? numbers[1] : numbers[3], row.lanes / 2);
    R sum = is_odd_quarter ? odd : even;
    sum += __shfl_xor_sync(ALL_LANES, is_odd_quarter ? even : odd, row.lanes / 4);
    for (int distance = row.lanes / 8; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    return sum;
}

/* Gradients of one sample from the scalar products of its corners with the gradient of the output row. */
template <class R>
__device__ void finish_sample(const Shape &shape, int index, const R *products, const R *__restrict__ locations,
                              const R *__restrict__ weights, R *__restrict__ grad_locations, R *__restrict__ grad_weights)
{
    const int level = index * shape.level_factor >> 16;
    const int height = shape.heights[level], width = shape.widths[level];
    const R *location = locations + 2 * index;
    R by_x, by_y, by_weight;
    Position<R> at;
    if (locate(at, location, height, width)) {
        const R weight = weights[index], down = at.down, up = 1 - down, right = at.right, left = 1 - right;
        by_x = weight * width * (up * (products[1] - products[0]) + down * (products[3] - products[2]));
        by_y = weight * height * (left * (products[2] - products[0]) + right * (products[3] - products[1]));
        by_weight = up * (left * products[0] + right * products[1]) + down * (left * products[2] + right * products[3]);
    } else {
        by_x = by_y = by_weight = (location[0] - location[0]) + (location[1] - location[1]); /* NaN if not finite */
    }
    if (grad_locations)
        grad_locations[2 * index] = by_x, grad_locations[2 * index + 1] = by_y;
    if (grad_weights)
        grad_weights[index] = by_weight;
}

/* WIDTH and LANES as in run_forward. A gradient that is null is not wanted. */
template <class Stored, int WIDTH, int LANES>
__global__ void __launch_bounds__(THREADS, LANES && sizeof(Stored) == 4 ? 3 : 2)
    run_backward(const __grid_constant__ Shape shape, const Stored *__restrict__ grad_output, const Stored *__restrict__ value,
                 const Real<Stored> *__restrict__ locations, const Real<Stored> *__restrict__ weights,
                 Real<Stored> *__restrict__ grad_value, Real<Stored> *__restrict__ grad_locations,
                 Real<Stored> *__restrict__ grad_weights)
{
    using R = Real<Stored>;
    const Row row = find_row<LANES>(shape);
    Sample<R> *samples = samples_of_row<R>(shape, row);
    const int channels = LANES ? LANES * WIDTH : shape.channels;
    const int64_t map = row.image * shape.map_size + row.head * channels, first_sample = row.index * shape.samples;
    const bool needs_products = grad_locations || grad_weights;
    value += map, grad_value += grad_value ? map : 0, grad_output += row.index * channels;
    locations += first_sample * 2, weights += first_sample;
    grad_locations += grad_locations ? first_sample * 2 : 0, grad_weights += grad_weights ? first_sample : 0;
    Gradient<Stored, WIDTH> gradient;
    if (LANES)
        gradient.fetch(grad_output, row, 0, channels);
    for (int first = 0; first < shape.samples; first += CHUNK<R>) {
        const int count = list_samples(samples, shape, row, first, locations, weights);
#pragma unroll 1
        for (int i = 0; i < count; i += AT_ONCE) {
            Sample<R> pair[AT_ONCE];
            for (int j = 0; j < AT_ONCE; j++)
                pair[j] = samples[i + j];
            R products[AT_ONCE][CORNERS] = {};
            for (int start = 0; start < channels; start += row.lanes * WIDTH) {
                if (!LANES)
                    gradient.fetch(grad_output, row, start, channels);
                if (needs_products)
                    gradient.multiply(products, pair, value);
                if (grad_value)
#pragma unroll /* or else `pair` leaves the registers; shorter loops are unrolled without being told */
                    for (int j = 0; j < AT_ONCE; j++)
                        gradient.spread(grad_value, pair[j], row);
            }
            if (needs_products) {
                __syncwarp(); /* all lanes have read the weights: the products take their place */
                for (int j = 0; j < AT_ONCE; j++) {
                    const R sum = sum_over_lanes(products[j], row);
                    if (row.lane % (row.lanes / CORNERS) == 0)
                        samples[i + j].weights[row.lane / (row.lanes / CORNERS)] = sum;
                }
            }
        }
        __syncwarp();
        if (needs_products && row.exists)
            for (int i = row.lane; i < count && first + i < shape.samples; i += row.lanes)
                finish_sample(shape, first + i, samples[i].weights, locations, weights, grad_locations, grad_weights);
    }
}

/* -------------------------------------------------------------------------------------------------------------- launch */

/* Makes a device current, and at the end of its life the one that was. */
struct CurrentDevice {
    int previous = -1;
    cudaError_t error;
    explicit CurrentDevice(int device)
    {
        error = cudaGetDevice(&previous);
        if (error == cudaSuccess)
            error = cudaSetDevice(device);
    }
    ~CurrentDevice()
    {
        if (previous >= 0)
            cudaSetDevice(previous);
    }
};

/* Arguments of both directions; those that a direction does not have stay null. */
struct Call {
    const mpformer_sizes *sizes;
    const mpformer_place *place;
    const void *grad_output, *value, *locations, *weights;
    void *output, *grad_value, *grad_locations, *grad_weights;
};

int check(const mpformer_sizes &sizes, int64_t bytes_of_number)
{
    if (sizes.levels < 1 || sizes.levels > MPFORMER_MAX_LEVELS || sizes.points < 1 || sizes.points > MPFORMER_MAX_POINTS ||
        sizes.channels < 1 || sizes.channels > MPFORMER_MAX_CHANNELS || sizes.images < 0 || sizes.images > MAX_IMAGES ||
        sizes.queries < 0 || sizes.heads < 0 || sizes.heads > MAX_BLOCKS || sizes.cells < 0 ||
        (sizes.heads && sizes.cells > MAX_MAP_BYTES / (sizes.heads * sizes.channels * bytes_of_number)))
        return MPFORMER_BAD_SIZE;
    int64_t cells = 0;
    for (int64_t level = 0; level < sizes.levels; level++) {
        const int64_t height = sizes.heights[level], width = sizes.widths[level];
        if (height < 0 || width < 0 || height > MAX_SIDE || width > MAX_SIDE)
            return MPFORMER_BAD_SIZE;
        cells += height * width;
    }
    return cells == sizes.cells ? MPFORMER_OK : MPFORMER_BAD_SIZE;
}

template <class Stored> Shape make_shape(const mpformer_sizes &sizes, int width)
{
    using R = Real<Stored>;
    Shape shape = {};
    shape.queries = sizes.queries, shape.map_size = sizes.cells * sizes.heads * sizes.channels;
    shape.heads = (int)sizes.heads, shape.channels = (int)sizes.channels, shape.samples = (int)(sizes.levels * sizes.points);
    shape.level_factor = 65536 / (int)sizes.points + 1; /* exact for 64 samples */
    shape.lanes = MIN_LANES;
    while (shape.lanes < WARP_LANES && shape.lanes * width < shape.channels)
        shape.lanes *= 2;
    const int count = shape.samples < CHUNK<R> ? shape.samples : CHUNK<R>;
    const int padded = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    /* An odd number of 16-byte units from row to row keeps the rows of a warp in different banks. */
    shape.row_bytes = (padded * (int)sizeof(Sample<R>) / 16 | 1) * 16;
    shape.cell_bytes = (unsigned)(sizes.heads * sizes.channels * sizeof(Stored));
    unsigned first_byte = 0;
    for (int level = 0; level < sizes.levels; level++) {
        shape.heights[level] = (int)sizes.heights[level], shape.widths[level] = (int)sizes.widths[level];
        shape.first_bytes[level] = first_byte;
        first_byte += (unsigned)shape.heights[level] * shape.widths[level] * shape.cell_bytes;
    }
    return shape;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Shape, Parameters...), const Shape &shape, const Call &call, Arguments... arguments)
{
    const int rows = THREADS / shape.lanes;
    const int64_t tiles = shape.queries / rows + (shape.queries % rows != 0);
    if (tiles > MAX_BLOCKS / shape.heads)
        return MPFORMER_BAD_SIZE;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(tiles * shape.heads), (unsigned)call.sizes->images);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = (size_t)rows * shape.row_bytes;
    config.stream = static_cast<cudaStream_t>(call.place->stream);
    const CurrentDevice current(call.place->device);
    if (current.error != cudaSuccess)
        return current.error;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, shape, static_cast<Parameters>(arguments)...);
    const cudaError_t last = cudaGetLastError(); /* also clears it */
    return error != cudaSuccess ? error : last;
}

template <class Stored, int WIDTH, int LANES> int run(const Call &call)
{
    const Shape shape = make_shape<Stored>(*call.sizes, WIDTH);
    if (call.output)
        return launch(run_forward<Stored, WIDTH, LANES>, shape, call, call.value, call.locations, call.weights, call.output);
    return launch(run_backward<Stored, WIDTH, LANES>, shape, call, call.grad_output, call.value, call.locations, call.weights,
                  call.grad_value, call.grad_locations, call.grad_weights);
}

/* True if all pointers and rows allow vectors of `width` channels. */
template <class Stored> bool allows_width(const Call &call, int width)
{
    const int added = width < 4 ? width : 4; /* at most this many numbers are added at once to `grad_value` */
    const auto addresses = (uintptr_t)call.value | (uintptr_t)call.output | (uintptr_t)call.grad_output;
    return call.sizes->channels % width == 0 && addresses % (width * sizeof(Stored)) == 0 &&
           (uintptr_t)call.grad_value % (added * sizeof(Real<Stored>)) == 0;
}

template <class Stored, int WIDTH = ACCESS_BYTES / sizeof(Stored)> int choose_width(const Call &call)
{
    if constexpr (WIDTH > 1)
        if (!allows_width<Stored>(call, WIDTH))
            return choose_width<Stored, WIDTH / 2>(call);
    if constexpr (WIDTH * sizeof(Stored) == ACCESS_BYTES && sizeof(Stored) < 8) { /* the usual sizes of a head */
        if (call.sizes->channels == 32)
            return run<Stored, WIDTH, 32 / WIDTH>(call);
        if (call.sizes->channels == 64)
            return run<Stored, WIDTH, 64 / WIDTH>(call);
    }
    return run<Stored, WIDTH, 0>(call);
}

int choose_type(int type, const Call &call)
{
    if (type < MPFORMER_FLOAT32 || type > MPFORMER_FLOAT16)
        return MPFORMER_BAD_TYPE;
    const int status = check(*call.sizes, type == MPFORMER_FLOAT64 ? 8 : type == MPFORMER_FLOAT32 ? 4 : 2);
    const bool is_wanted = call.output || call.grad_value || call.grad_locations || call.grad_weights;
    if (status || !is_wanted || call.sizes->images == 0 || call.sizes->queries == 0 || call.sizes->heads == 0)
        return status;
    switch (type) {
    case MPFORMER_FLOAT32:
        return choose_width<float>(call);
    case MPFORMER_BFLOAT16:
        return choose_width<__nv_bfloat16>(call);
    case MPFORMER_FLOAT16:
        return choose_width<__half>(call);
    default:
        return choose_width<double>(call);
    }
}

} // namespace

/* ----------------------------------------------------------------------------------------------------------- interface */

#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)

int mpformer_abi_version(void) { return MPFORMER_ABI_VERSION; }

const char *mpformer_describe(void) { return "CUDA, compiled for architectures " TEXT(__CUDA_ARCH_LIST__); }

const char *mpformer_explain(int status)
{
    switch (status) {
    case MPFORMER_BAD_TYPE:
        return "the CUDA kernels know float32, float16, bfloat16 and float64 only";
    case MPFORMER_BAD_SIZE:
        return "the CUDA kernels handle 1 to 8 levels of at most 16777216 cells a side, 1 to 8 points, 1 to 128 channels "
               "a head, and at most 65535 images whose values take at most 4 GiB each";
    default:
        return status < 0 ? "unknown error" : cudaGetErrorString(static_cast<cudaError_t>(status));
    }
}

int mpformer_forward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place, const void *value,
                     const void *locations, const void *weights, void *output)
{
    return choose_type(type, {sizes, place, nullptr, value, locations, weights, output, nullptr, nullptr, nullptr});
}

int mpformer_backward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place,
                      const void *grad_output, const void *value, const void *locations, const void *weights, void *grad_value,
                      void *grad_locations, void *grad_weights)
{
    return choose_type(type, {sizes, place, grad_output, value, locations, weights, nullptr, grad_value, grad_locations,
                              grad_weights});
}
