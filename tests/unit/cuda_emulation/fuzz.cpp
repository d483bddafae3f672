/* Random shapes, types, addresses and locations through the kernels, for a build with AddressSanitizer and UBSan: each array is
 * an allocation of its own and just as long as it must be. The results are compared with plain loops in float64.
 *
 * With FUZZ_CPU, the CPU kernels, compiled on their own and linked; else the CUDA kernels, emulated.
 *
 * Usage: fuzz <first seed> <number of seeds>
 */
#ifdef FUZZ_CPU
#include "ms_deform_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>
#define NUM_TYPES 3 /* no float16 */
#else
#include "ms_deform_attn_cuda.cu"
#define NUM_TYPES 4
#endif

namespace {

const int CHANNELS[] = {1, 2, 3, 4, 8, 12, 20, 32, 36, 64, 96, 127, 128};
const double ODD_LOCATIONS[] = {0, 1, 0.5, -0.25, 1.25, 1e30, -1e30, INFINITY, -INFINITY, NAN, 1e-40, 3e38};
const int BYTES[] = {4, 2, 8, 2}; /* by enum mpformer_type */

std::mt19937 random_bits;

int draw(int end) { return (int)(random_bits() % (unsigned)end); }
double draw_real() { return random_bits() / 4294967296.0; }

/* `count` numbers of a type, from a place on that this type may have, with nothing behind them. */
struct Array {
    int type;
    size_t count;
    unsigned char *memory, *numbers;

    Array(int type, size_t count) : type(type), count(count)
    {
        const size_t skipped = draw(2) ? 0 : BYTES[type] * (size_t)draw(4);
        memory = (unsigned char *)malloc(skipped + count * BYTES[type] + (count == 0));
        numbers = memory + skipped;
        for (size_t i = 0; i < count; i++)
            set(i, NAN);
    }
    ~Array() { free(memory); }

    void set(size_t i, double number)
    {
        const __half half = __float2half_rn((float)number);
        const __nv_bfloat16 bfloat = __float2bfloat16_rn((float)number);
        const float single = (float)number;
        const void *sources[] = {&single, &bfloat, &number, &half};
        memcpy(numbers + i * BYTES[type], sources[type], BYTES[type]);
    }
    double operator[](size_t i) const
    {
        __half half;
        __nv_bfloat16 bfloat;
        float single;
        double number;
        void *targets[] = {&single, &bfloat, &number, &half};
        memcpy(targets[type], numbers + i * BYTES[type], BYTES[type]);
        const double numbers_read[] = {type == 0 ? single : 0, type == 1 ? __bfloat162float(bfloat) : 0, type == 2 ? number : 0,
                                       type == 3 ? __half2float(half) : 0};
        return numbers_read[type];
    }
};

void expect_close(const char *name, const Array &found, const std::vector<double> &expected, unsigned seed)
{
    const double tolerance = found.type == MPFORMER_BFLOAT16 ? 8e-3 : found.type == MPFORMER_FLOAT16 ? 2e-3 : 2e-4;
    for (size_t i = 0; i < found.count; i++) {
        const double difference = fabs(found[i] - expected[i]);
        if (std::isnan(found[i]) != std::isnan(expected[i]) || difference > tolerance * (1 + fabs(expected[i]))) {
            fprintf(stderr, "seed %u: %s[%zu] is %g, expected %g\n", seed, name, i, found[i], expected[i]);
            exit(1);
        }
    }
}

/* A location of the type's precision, not so near to a cell's centre that rounding could move it over. */
double draw_location(int type, int64_t side)
{
    if (draw(12) == 0)
        return ODD_LOCATIONS[draw(sizeof ODD_LOCATIONS / sizeof *ODD_LOCATIONS)];
    const double cell = draw((int)side + 3) - 1.5 + 0.05 + 0.9 * draw_real(), location = side ? cell / (double)side : cell;
    return type == MPFORMER_FLOAT64 ? location : (double)(float)location;
}

void run_seed(unsigned seed)
{
    random_bits.seed(seed);
    const int type = draw(NUM_TYPES), real_type = type == MPFORMER_FLOAT64 ? MPFORMER_FLOAT64 : MPFORMER_FLOAT32;
    mpformer_sizes sizes = {};
    const int64_t images = sizes.images = draw(8) ? 1 + draw(2) : 0, queries = sizes.queries = draw(8) ? 1 + draw(40) : 0;
    const int64_t heads = sizes.heads = 1 + draw(3), channels = sizes.channels = CHANNELS[draw(13)];
    const int most = draw(4) ? 3 : 8; /* levels and points: seldom many, because that takes time */
    const int64_t levels = sizes.levels = 1 + draw(most), points = sizes.points = 1 + draw(most), samples = levels * points;
    std::vector<int64_t> first_cells;
    for (int64_t level = 0; level < levels; level++) {
        first_cells.push_back(sizes.cells);
        sizes.heights[level] = draw(10) ? 1 + draw(5) : 0, sizes.widths[level] = draw(10) ? 1 + draw(5) : 0;
        sizes.cells += sizes.heights[level] * sizes.widths[level];
    }
    const int64_t rows = images * queries * heads;
    Array value(type, images * sizes.cells * heads * channels), locations(real_type, rows * samples * 2);
    Array weights(real_type, rows * samples), output(type, rows * channels), grad_output(type, rows * channels);
    Array grad_value(real_type, value.count), grad_locations(real_type, locations.count);
    Array grad_weights(real_type, weights.count);
    for (Array *array : {&value, &grad_output, &weights})
        for (size_t i = 0; i < array->count; i++)
            array->set(i, 2 * draw_real() - 1);
    for (size_t i = 0; i < grad_value.count; i++)
        grad_value.set(i, 0);
    for (size_t i = 0; i < locations.count; i++) {
        const int64_t level = i / 2 / points % levels;
        locations.set(i, draw_location(real_type, i % 2 ? sizes.heights[level] : sizes.widths[level]));
    }

    std::vector<double> sums(output.count), by_value(value.count), by_location(locations.count), by_weight(weights.count);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t sample = row * samples; sample < (row + 1) * samples; sample++) {
            const int64_t level = sample / points % levels, height = sizes.heights[level], width = sizes.widths[level];
            const double u = locations[2 * sample], v = locations[2 * sample + 1], weight = weights[sample];
            if (!std::isfinite(u) || !std::isfinite(v)) {
                by_location[2 * sample] = by_location[2 * sample + 1] = by_weight[sample] = NAN;
                for (int64_t d = 0; d < channels; d++)
                    sums[row * channels + d] = NAN;
                continue;
            }
            const double x = u * (double)width - 0.5, y = v * (double)height - 0.5;
            for (int corner = 0; corner < 4; corner++) {
                const double j = floor(x) + corner % 2, i = floor(y) + corner / 2;
                if (i < 0 || j < 0 || i >= (double)height || j >= (double)width)
                    continue;
                const double across = 1 - fabs(x - j), along = 1 - fabs(y - i);
                const int64_t cell = first_cells[level] + (int64_t)i * width + (int64_t)j, image = row / (queries * heads);
                for (int64_t d = 0; d < channels; d++) {
                    const int64_t at = ((image * sizes.cells + cell) * heads + row % heads) * channels + d;
                    const double product = grad_output[row * channels + d] * value[at];
                    sums[row * channels + d] += weight * across * along * value[at];
                    by_value[at] += weight * across * along * grad_output[row * channels + d];
                    by_weight[sample] += across * along * product;
                    by_location[2 * sample] += weight * along * (double)width * (corner % 2 ? product : -product);
                    by_location[2 * sample + 1] += weight * across * (double)height * (corner / 2 ? product : -product);
                }
            }
        }

    mpformer_place place = {};
    place.threads = 1 + draw(4);
    int status = mpformer_forward(type, &sizes, &place, value.numbers, locations.numbers, weights.numbers, output.numbers);
    const bool wants[] = {draw(4) != 0, draw(4) != 0, draw(4) != 0};
    status |= mpformer_backward(type, &sizes, &place, grad_output.numbers, value.numbers, locations.numbers, weights.numbers,
                                wants[0] ? grad_value.numbers : nullptr, wants[1] ? grad_locations.numbers : nullptr,
                                wants[2] ? grad_weights.numbers : nullptr);
    if (status) {
        fprintf(stderr, "seed %u: status %d\n", seed, status);
        exit(1);
    }
    expect_close("output", output, sums, seed);
    if (wants[0])
        expect_close("grad_value", grad_value, by_value, seed);
    if (wants[1])
        expect_close("grad_locations", grad_locations, by_location, seed);
    if (wants[2])
        expect_close("grad_weights", grad_weights, by_weight, seed);
}

} // namespace

int main(int count, char **arguments)
{
    const unsigned first = count > 1 ? (unsigned)atoi(arguments[1]) : 0, seeds = count > 2 ? (unsigned)atoi(arguments[2]) : 10;
    for (unsigned seed = first; seed < first + seeds; seed++)
        run_seed(seed);
    printf("%u shapes\n", seeds);
}
