/* The arithmetic of ms_deform_attn_cpu.c for one instruction set and one type. No include guard: it is included once for each
 * ISA, and includes itself once for each type.
 *
 * Given: ISA, TARGET, VECTOR_BYTES, CHAINS (see ms_deform_attn_cpu.c). STORED is the type in memory, REAL the type of the sums.
 *
 * The cells of one head are first packed: side by side (in `value` they are N * D apart, and most of a cache would stay empty),
 * as REAL, filled up with zeros to whole vectors, and with a border of zeros around each level. Then each sample has four corners,
 * wherever it lies, and nothing is asked in the innermost loops. Samples that lie outside altogether get a place of zeros.
 */
#if !defined(STORED)

#define TYPE float32
#define STORED float
#define REAL float
#define INTEGER int32_t
#include "ms_deform_attn_cpu_kernel.h"

#define TYPE bfloat16
#define STORED uint16_t
#define REAL float
#define INTEGER int32_t
#define IS_BFLOAT16
#include "ms_deform_attn_cpu_kernel.h"
#undef IS_BFLOAT16

#define TYPE float64
#define STORED double
#define REAL double
#define INTEGER int64_t
#define IS_FLOAT64
#include "ms_deform_attn_cpu_kernel.h"
#undef IS_FLOAT64

#else

#define NAME(name) JOIN(name, TYPE, ISA)
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define BLOCK (USUAL_CHANNELS / LANES) /* vectors of channels whose sums are kept in registers together */

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER NAME(integers) __attribute__((vector_size(VECTOR_BYTES)));

TARGET INLINE void NAME(widen)(REAL *reals, const STORED *stored, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
#ifdef IS_BFLOAT16
        const uint32_t bits = (uint32_t)stored[i] << 16;
        memcpy(&reals[i], &bits, sizeof bits);
#else
        reals[i] = stored[i];
#endif
    }
}

TARGET INLINE void NAME(narrow)(STORED *stored, const REAL *reals, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
#ifdef IS_BFLOAT16
        uint32_t bits;
        memcpy(&bits, &reals[i], sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  /* to the nearest, ties to even */
        stored[i] = (uint16_t)(reals[i] == reals[i] ? rounded : 0x7fc0);    /* rounding could turn NaN into infinity */
#else
        stored[i] = reals[i];
#endif
    }
}

/* Sums of the lanes of four vectors. */
TARGET INLINE void NAME(add_up)(const NAME(vector) vectors[4], REAL sums[4])
{
    typedef REAL quarter __attribute__((vector_size(16)));
    quarter folded[4];
    for (int64_t i = 0; i < 4; i++) {
        quarter parts[VECTOR_BYTES / 16];
        memcpy(parts, &vectors[i], sizeof parts);
#if VECTOR_BYTES == 64
        folded[i] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#elif VECTOR_BYTES == 32
        folded[i] = parts[0] + parts[1];
#else
        folded[i] = parts[0];
#endif
    }
#ifdef IS_FLOAT64
    for (int64_t i = 0; i < 4; i++)
        sums[i] = folded[i][0] + folded[i][1];
#else
    const quarter first = SHUFFLE(folded[0], folded[1], 0, 1, 4, 5) + SHUFFLE(folded[0], folded[1], 2, 3, 6, 7);
    const quarter second = SHUFFLE(folded[2], folded[3], 0, 1, 4, 5) + SHUFFLE(folded[2], folded[3], 2, 3, 6, 7);
    const quarter all = SHUFFLE(first, second, 0, 2, 4, 6) + SHUFFLE(first, second, 1, 3, 5, 7);
    memcpy(sums, &all, sizeof all);
#endif
}

/* ------------------------------------------------------------------------------------------------------------- packing */

/* Copy the levels [first, end) of one head into a packed map that is zero. `value` is the head's first cell. */
TARGET INLINE void NAME(pack)(const struct call *call, int64_t first, int64_t end, const STORED *value, REAL *packed)
{
    const int64_t channels = call->sizes.channels, cell_size = call->sizes.heads * channels;
    const int64_t packed_size = round_up(channels, LANES);
    for (int64_t level = first; level < end; level++) {
        const STORED *cell = value + call->first_cell[level] * cell_size;
        for (int64_t row = 0; row < call->sizes.heights[level]; row++) {
            REAL *target = packed + find_cell(call, first, level, row) * packed_size;
            for (int64_t column = 0; column < call->sizes.widths[level]; column++) {
                NAME(widen)(target, cell, channels);
                cell += cell_size;
                target += packed_size;
            }
        }
    }
}

/* Copy one level of a packed map to one head of `grad_value`. */
TARGET INLINE void NAME(unpack)(const struct call *call, int64_t level, const REAL *packed, REAL *grad_value)
{
    const int64_t channels = call->sizes.channels, cell_size = call->sizes.heads * channels;
    const int64_t packed_size = round_up(channels, LANES);
    REAL *cell = grad_value + call->first_cell[level] * cell_size;
    for (int64_t row = 0; row < call->sizes.heights[level]; row++) {
        const REAL *source = packed + find_cell(call, level, level, row) * packed_size;
        for (int64_t column = 0; column < call->sizes.widths[level]; column++) {
            memcpy(cell, source, channels * sizeof(REAL));
            cell += cell_size;
            source += packed_size;
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- samples */

/* Samples that are located together: arrays, not structures, one lane a sample. */
struct NAME(group) {
    _Alignas(64) REAL x[GROUP], y[GROUP], weight[GROUP];       /* as given */
    REAL width_real[GROUP], height_real[GROUP];                /* the level */
    INTEGER pitch[GROUP], origin[GROUP];                       /* of the packed level: cells in a row; the cell (0, 0) */
    INTEGER cell[GROUP];                                       /* in the packed map: the corner up left */
    REAL right[GROUP], down[GROUP];                            /* how far from it, in [0, 1) */
    REAL corner_weights[4][GROUP];                             /* bilinear times attention: up left, up right, down left, right */
};

TARGET INLINE void NAME(set_level)(struct NAME(group) *group, int64_t sample, const struct call *call, int64_t first_level,
                                   int64_t level)
{
    group->width_real[sample] = (REAL)call->sizes.widths[level];
    group->height_real[sample] = (REAL)call->sizes.heights[level];
    group->pitch[sample] = (INTEGER)pitch_of(call, level);
    group->origin[sample] = (INTEGER)find_cell(call, first_level, level, 0);
}

/* Copy samples into a group, and start to fetch those that are `ahead` of them: the processor does not guess such wide steps. */
TARGET INLINE void NAME(copy_samples)(struct NAME(group) *group, int64_t first, int64_t count, const REAL *locations,
                                      const REAL *weights, int64_t ahead)
{
    for (int64_t line = 0; line * CACHE_LINE < count * (int64_t)sizeof(REAL); line++) {
        prefetch(locations, 2 * ahead * sizeof(REAL) + 2 * line * CACHE_LINE);
        prefetch(locations, 2 * ahead * sizeof(REAL) + (2 * line + 1) * CACHE_LINE);
        prefetch(weights, ahead * sizeof(REAL) + line * CACHE_LINE);
    }
    for (int64_t i = 0; i < count; i++) {
        group->x[first + i] = locations[2 * i];
        group->y[first + i] = locations[2 * i + 1];
        group->weight[first + i] = weights[i];
    }
}

/* Zero, or NaN if any of the three is not finite. */
#define NOT_FINITE(x, y, weight) (((x) - (x)) + ((y) - (y)) + ((weight) - (weight)))

/* Locate samples that have been copied and whose level has been set. Returns whether a location or a weight is not finite. */
TARGET INLINE int NAME(locate)(struct NAME(group) *group, int64_t count)
{
    NAME(integers) bad = {0};
    for (int64_t i = 0; i < count; i += LANES) {
#define OF(array) (*(NAME(vector) *)(group->array + i))
#define INTEGERS_OF(array) (*(NAME(integers) *)(group->array + i))
        /* Not fused: rounding takes a location that was meant to be at a cell's centre back to the centre. */
        NAME(vector) x = OF(x) * OF(width_real), y = OF(y) * OF(height_real);
        KEEP_ROUNDED(x);
        KEEP_ROUNDED(y);
        x -= (REAL)0.5;
        y -= (REAL)0.5;
        /* All bits are set where a comparison is true; with NaN it is false. */
        const NAME(integers) near = (x >= -1) & (y >= -1) & (x < OF(width_real)) & (y < OF(height_real));
        const NAME(vector) x_near = (NAME(vector))((NAME(integers))x & near);
        const NAME(vector) y_near = (NAME(vector))((NAME(integers))y & near);
        const NAME(vector) weight = (NAME(vector))((NAME(integers))OF(weight) & near);
        /* Cutting the fraction off, and one less for negative numbers that have one. */
        const NAME(integers) x_whole = __builtin_convertvector(x_near, NAME(integers));
        const NAME(integers) y_whole = __builtin_convertvector(y_near, NAME(integers));
        const NAME(integers) column = x_whole + (x_near < __builtin_convertvector(x_whole, NAME(vector)));
        const NAME(integers) row = y_whole + (y_near < __builtin_convertvector(y_whole, NAME(vector)));
        const NAME(vector) right = x_near - __builtin_convertvector(column, NAME(vector));
        const NAME(vector) down = y_near - __builtin_convertvector(row, NAME(vector));
        const NAME(vector) weight_down = weight * down, weight_up = weight - weight_down;
        INTEGERS_OF(cell) = (INTEGERS_OF(origin) + row * INTEGERS_OF(pitch) + column) & near;
        OF(right) = right;
        OF(down) = down;
        OF(corner_weights[1]) = weight_up * right;
        OF(corner_weights[0]) = weight_up - OF(corner_weights[1]);
        OF(corner_weights[3]) = weight_down * right;
        OF(corner_weights[2]) = weight_down - OF(corner_weights[3]);
        bad |= ~(NOT_FINITE(OF(x), OF(y), OF(weight)) == 0);
#undef OF
#undef INTEGERS_OF
    }
    INTEGER any = 0;
    for (int64_t lane = 0; lane < LANES; lane++)
        any |= bad[lane];
    return any != 0;
}

/* ------------------------------------------------------------------------------------------------------------- forward */

/* Weighted sums of `vectors` vectors of channels over the samples [first, end) of a group. */
TARGET INLINE void NAME(sum_block)(REAL *sums, const REAL *packed, int64_t packed_size, const struct NAME(group) *group,
                                   int64_t first, int64_t end, int64_t vectors)
{
    NAME(vector) chains[CHAINS][BLOCK]; /* several, so that multiply-adds need not wait for each other */
    for (int64_t chain = 0; chain < CHAINS; chain++)
        for (int64_t i = 0; i < vectors; i++)
            chains[chain][i] = (NAME(vector)){0};
    for (int64_t sample = first; sample < end; sample++) {
        const REAL *cells = packed + (int64_t)group->cell[sample] * packed_size;
        const int64_t below = group->pitch[sample] * packed_size, corners[4] = {0, packed_size, below, below + packed_size};
        for (int64_t corner = 0; corner < 4; corner++)
            for (int64_t i = 0; i < vectors; i++)
                chains[corner % CHAINS][i] +=
                    group->corner_weights[corner][sample] * *(const NAME(vector) *)(cells + corners[corner] + i * LANES);
    }
    for (int64_t i = 0; i < vectors; i++) {
        for (int64_t chain = 1; chain < CHAINS; chain++)
            chains[0][i] += chains[chain][i];
        *(NAME(vector) *)(sums + i * LANES) = chains[0][i];
    }
}

/* One output row. */
TARGET INLINE void NAME(sum_row)(STORED *output, const REAL *packed, int64_t channels, const struct NAME(group) *group,
                                 int64_t first, int64_t end)
{
    const int64_t packed_size = round_up(channels, LANES);
    _Alignas(64) REAL sums[MPFORMER_MAX_CHANNELS];
    int64_t channel = 0;
    for (; channel + BLOCK * LANES <= packed_size; channel += BLOCK * LANES)
        NAME(sum_block)(sums + channel, packed + channel, packed_size, group, first, end, BLOCK);
    for (; channel < packed_size; channel += LANES)
        NAME(sum_block)(sums + channel, packed + channel, packed_size, group, first, end, 1);
    NAME(narrow)(output, sums, channels);
}

/* Make an output row NaN if one of its locations, or the weight of a sample outside, is not finite. */
TARGET INLINE void NAME(poison)(STORED *output, int64_t channels, const struct NAME(group) *group, int64_t first, int64_t end)
{
    REAL poison = 0;
    for (int64_t sample = first; sample < end; sample++)
        poison += NOT_FINITE(group->x[sample], group->y[sample], group->weight[sample]);
    if (!(poison == 0))
        for (int64_t channel = 0; channel < channels; channel++)
            NAME(narrow)(output + channel, &poison, 1);
}

/* Units are (image, head, part of the queries). */
TARGET static void NAME(run_forward)(struct call *call)
{
    const struct mpformer_sizes *sizes = &call->sizes;
    const int64_t channels = sizes->channels, samples = sizes->levels * sizes->points, rows_a_group = GROUP / samples;
    const int64_t queries_a_part = (sizes->queries + call->parts - 1) / call->parts;
    struct NAME(group) group;
    memset(&group, 0, sizeof group); /* the lanes after the last sample are computed with */
    for (int64_t sample = 0; sample < rows_a_group * samples; sample++)
        NAME(set_level)(&group, sample, call, 0, sample % samples / sizes->points);
    const int64_t cell_bytes = round_up(channels, LANES) * sizeof(REAL), cells = count_cells(call, 0, sizes->levels);
    REAL *packed = make_map(call, cells, cell_bytes);
    if (packed)
        memset(packed, 0, cells * cell_bytes);
    for (int64_t unit = take_unit(call); packed && unit < call->units; unit = take_unit(call)) {
        const int64_t head = unit / call->parts % sizes->heads, image = unit / call->parts / sizes->heads;
        int64_t query = unit % call->parts * queries_a_part;
        const int64_t end = query + queries_a_part < sizes->queries ? query + queries_a_part : sizes->queries;
        const int64_t first_cell = (image * sizes->cells * sizes->heads + head) * channels;
        NAME(pack)(call, 0, sizes->levels, (const STORED *)call->value + first_cell, packed);
        for (; query < end; query += rows_a_group) {
            const int64_t rows = end - query < rows_a_group ? end - query : rows_a_group;
            const int64_t first_row = (image * sizes->queries + query) * sizes->heads + head;
            for (int64_t i = 0; i < rows; i++) {
                const int64_t sample = (first_row + i * sizes->heads) * samples;
                NAME(copy_samples)(&group, i * samples, samples, (const REAL *)call->locations + 2 * sample,
                                   (const REAL *)call->weights + sample, rows_a_group * sizes->heads * samples);
            }
            const int is_bad = NAME(locate)(&group, rows * samples);
            for (int64_t i = 0; i < rows; i++) {
                STORED *output = (STORED *)call->output + (first_row + i * sizes->heads) * channels;
                if (channels == USUAL_CHANNELS) /* a constant to the compiler */
                    NAME(sum_row)(output, packed, USUAL_CHANNELS, &group, i * samples, (i + 1) * samples);
                else
                    NAME(sum_row)(output, packed, channels, &group, i * samples, (i + 1) * samples);
                if (is_bad)
                    NAME(poison)(output, channels, &group, i * samples, (i + 1) * samples);
            }
        }
    }
    free(packed);
}

/* ------------------------------------------------------------------------------------------------------------ backward */

/* One sample: dot products of an output row's gradient with the four corners, and, unless `grad_packed` is NULL, the former times
 * the corners' weights added to the gradients of the latter. */
TARGET INLINE void NAME(visit_sample)(const struct NAME(group) *group, int64_t sample, const REAL *grad_row, const REAL *packed,
                                      REAL *grad_packed, int64_t packed_size, REAL products[4])
{
    const int64_t cell = (int64_t)group->cell[sample] * packed_size, below = group->pitch[sample] * packed_size;
    const int64_t corners[4] = {cell, cell + packed_size, cell + below, cell + below + packed_size};
    NAME(vector) sums[4] = {{0}, {0}, {0}, {0}};
    for (int64_t channel = 0; channel < packed_size; channel += LANES) {
        const NAME(vector) grad = *(const NAME(vector) *)(grad_row + channel);
        for (int64_t corner = 0; corner < 4; corner++) {
            sums[corner] += grad * *(const NAME(vector) *)(packed + corners[corner] + channel);
            if (grad_packed)
                *(NAME(vector) *)(grad_packed + corners[corner] + channel) += group->corner_weights[corner][sample] * grad;
        }
    }
    NAME(add_up)(sums, products);
}

/* The samples of a group, `points` for each row of `grad_output`. */
TARGET INLINE void NAME(visit_group)(const struct NAME(group) *group, int64_t rows, int64_t points, const REAL *grad_output,
                                     const REAL *packed, REAL *grad_packed, int64_t packed_size, REAL products[GROUP][4])
{
    for (int64_t row = 0; row < rows; row++)
        for (int64_t sample = row * points; sample < (row + 1) * points; sample++)
            NAME(visit_sample)(group, sample, grad_output + row * packed_size, packed, grad_packed, packed_size,
                               products[sample]);
}

/* Gradients of a group's locations and weights. */
TARGET INLINE void NAME(finish_group)(const struct NAME(group) *restrict group, int64_t count, REAL products[GROUP][4],
                                      REAL *restrict grad_locations, REAL *restrict grad_weights)
{
    for (int64_t i = 0; i < count; i++) {
        const REAL *product = products[i];
        const REAL right = group->right[i], left = 1 - right, down = group->down[i], up = 1 - down;
        const REAL poison = NOT_FINITE(group->x[i], group->y[i], (REAL)0);
        grad_locations[2 * i] = group->weight[i] * group->width_real[i] *
                                    (up * (product[1] - product[0]) + down * (product[3] - product[2])) +
                                poison;
        grad_locations[2 * i + 1] = group->weight[i] * group->height_real[i] *
                                        (left * (product[2] - product[0]) + right * (product[3] - product[1])) +
                                    poison;
        grad_weights[i] =
            up * (left * product[0] + right * product[1]) + down * (left * product[2] + right * product[3]) + poison;
    }
}

/* What a thread of the backward works with. */
struct NAME(scratch) {
    struct NAME(group) group;
    _Alignas(64) REAL grad_output[QUERIES_A_GROUP * MPFORMER_MAX_CHANNELS];
    REAL products[GROUP][4], grad_locations[2 * GROUP], grad_weights[GROUP];
};

/* `queries` queries of one (image, head, level), the first of them in the row `first_row` of the output. */
TARGET INLINE void NAME(visit_queries)(const struct call *call, int64_t level, int64_t first_row, int64_t queries,
                                       const REAL *packed, REAL *grad_packed, struct NAME(scratch) *scratch)
{
    const struct mpformer_sizes *sizes = &call->sizes;
    const int64_t channels = sizes->channels, points = sizes->points, packed_size = round_up(channels, LANES);
    const int64_t first_sample = (first_row * sizes->levels + level) * points, count = queries * points;
    const int64_t stride = sizes->heads * sizes->levels * points; /* samples from one query to the next */
    for (int64_t i = 0; i < queries; i++) {
        const int64_t sample = first_sample + i * stride;
        NAME(widen)(scratch->grad_output + i * packed_size,
                    (const STORED *)call->grad_output + (first_row + i * sizes->heads) * channels, channels);
        NAME(copy_samples)(&scratch->group, i * points, points, (const REAL *)call->locations + 2 * sample,
                           (const REAL *)call->weights + sample, QUERIES_A_GROUP * stride);
    }
    NAME(locate)(&scratch->group, count);
    if (channels == USUAL_CHANNELS) /* a constant to the compiler */
        NAME(visit_group)(&scratch->group, queries, points, scratch->grad_output, packed, grad_packed, USUAL_CHANNELS,
                          scratch->products);
    else
        NAME(visit_group)(&scratch->group, queries, points, scratch->grad_output, packed, grad_packed, packed_size,
                          scratch->products);
    NAME(finish_group)(&scratch->group, count, scratch->products, scratch->grad_locations, scratch->grad_weights);
    for (int64_t i = 0; i < queries; i++) {
        const int64_t sample = first_sample + i * stride;
        if (call->grad_locations)
            memcpy((REAL *)call->grad_locations + 2 * sample, scratch->grad_locations + 2 * i * points,
                   2 * points * sizeof(REAL));
        if (call->grad_weights)
            memcpy((REAL *)call->grad_weights + sample, scratch->grad_weights + i * points, points * sizeof(REAL));
    }
}

/* Units are (image, head, level): nobody else touches these cells of `grad_value`. */
TARGET static void NAME(run_backward)(struct call *call)
{
    const struct mpformer_sizes *sizes = &call->sizes;
    const int64_t cell_bytes = round_up(sizes->channels, LANES) * sizeof(REAL);
    struct NAME(scratch) scratch;
    memset(&scratch, 0, sizeof scratch); /* the lanes after the last sample and channel are computed with */
    int64_t most_cells = 0;
    for (int64_t level = 0; level < sizes->levels; level++)
        most_cells = count_cells(call, level, level + 1) > most_cells ? count_cells(call, level, level + 1) : most_cells;
    REAL *packed = make_map(call, most_cells, cell_bytes);
    REAL *grad_packed = call->grad_value ? make_map(call, most_cells, cell_bytes) : 0;
    const int is_ready = packed && (grad_packed || !call->grad_value);
    for (int64_t unit = take_unit(call); is_ready && unit < call->units; unit = take_unit(call)) {
        const int64_t level = unit % sizes->levels, head = unit / sizes->levels % sizes->heads;
        const int64_t image = unit / (sizes->levels * sizes->heads);
        const int64_t first_cell = (image * sizes->cells * sizes->heads + head) * sizes->channels;
        const int64_t cells = count_cells(call, level, level + 1);
        for (int64_t sample = 0; sample < QUERIES_A_GROUP * sizes->points; sample++)
            NAME(set_level)(&scratch.group, sample, call, level, level);
        memset(packed, 0, cells * cell_bytes);
        NAME(pack)(call, level, level + 1, (const STORED *)call->value + first_cell, packed);
        if (grad_packed)
            memset(grad_packed, 0, cells * cell_bytes);
        for (int64_t query = 0; query < sizes->queries; query += QUERIES_A_GROUP) {
            const int64_t left = sizes->queries - query, first_row = (image * sizes->queries + query) * sizes->heads + head;
            NAME(visit_queries)(call, level, first_row, left < QUERIES_A_GROUP ? left : QUERIES_A_GROUP, packed, grad_packed,
                                &scratch);
        }
        if (grad_packed)
            NAME(unpack)(call, level, grad_packed, (REAL *)call->grad_value + first_cell);
    }
    free(packed);
    free(grad_packed);
}

#undef NAME
#undef LANES
#undef BLOCK
#undef NOT_FINITE
#undef TYPE
#undef STORED
#undef REAL
#undef INTEGER
#endif
