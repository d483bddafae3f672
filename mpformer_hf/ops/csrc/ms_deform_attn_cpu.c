/* CPU kernels of ms_deform_attn.h. The arithmetic is in ms_deform_attn_cpu_kernel.h, which is included once for each pair of
 * type and instruction set; the instruction set is chosen when the library runs, so that a library built on one machine also
 * runs on an older one.
 *
 * Threads take units of work: in the forward (image, head, some of the queries), in the backward (image, head, level), so that
 * each cell of `grad_value` belongs to one thread and is added to in the order of the queries: no race, and the same bits every
 * time.
 */
#define _GNU_SOURCE
#include "ms_deform_attn.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP 256 /* samples that are located together; at least those of one output row */
#define QUERIES_A_GROUP (GROUP / MPFORMER_MAX_POINTS)
#define CACHE_LINE 64 /* bytes */
#define MIN_QUERIES_A_PART 64
#define MAX_THREADS 256
#define USUAL_CHANNELS 32 /* of a head; compiled specially */

/* One call, as the threads see it. */
struct call {
    struct mpformer_sizes sizes;
    int64_t first_cell[MPFORMER_MAX_LEVELS];
    int64_t void_cells; /* see find_cell */
    const void *value, *grad_output, *locations, *weights;
    void *output, *grad_value, *grad_locations, *grad_weights;
    void (*run)(struct call *call); /* works on units until none is left */
    int64_t units, parts;           /* forward: parts that the queries of a head are divided into */
    int64_t next_unit;              /* atomic */
    int status;                     /* atomic */
};

/* The number of a unit that nobody has taken yet; `units` or more if there is none. */
INLINE int64_t take_unit(struct call *call)
{
    return __atomic_fetch_add(&call->next_unit, 1, __ATOMIC_RELAXED);
}

/* Ask for memory that will be read soon; the address may lie behind the end of an array. */
INLINE void prefetch(const void *array, int64_t bytes)
{
    __builtin_prefetch((const void *)((uintptr_t)array + (uintptr_t)bytes));
}

/* --------------------------------------------------------------------------------------------------------- packed maps */

INLINE int64_t round_up(int64_t number, int64_t multiple)
{
    return (number + multiple - 1) / multiple * multiple;
}

/* Cells in a row of a packed level: one more on each side. */
INLINE int64_t pitch_of(const struct call *call, int64_t level)
{
    return call->sizes.widths[level] + 2;
}

INLINE int64_t packed_cells(const struct call *call, int64_t level)
{
    return pitch_of(call, level) * (call->sizes.heights[level] + 2);
}

/* Number of the cell (row, 0) of a level, in a packed map that starts with the level `first`. In front of the levels is a place
 * of zeros, large enough for the corners of a sample that lies outside. */
INLINE int64_t find_cell(const struct call *call, int64_t first, int64_t level, int64_t row)
{
    int64_t cell = 0;
    for (int64_t i = first; i < level; i++)
        cell += packed_cells(call, i);
    return cell + call->void_cells + pitch_of(call, level) * (row + 1) + 1;
}

/* Cells of a packed map of the levels [first, end). */
INLINE int64_t count_cells(const struct call *call, int64_t first, int64_t end)
{
    int64_t cells = call->void_cells;
    for (int64_t level = first; level < end; level++)
        cells += packed_cells(call, level);
    return cells;
}

/* Space for a packed map; NULL, and a status for the caller, if there is no memory. */
static void *make_map(struct call *call, int64_t cells, int64_t cell_bytes)
{
    void *map = aligned_alloc(64, (size_t)round_up(cells * cell_bytes, 64));
    if (!map)
        __atomic_store_n(&call->status, MPFORMER_NO_MEMORY, __ATOMIC_RELAXED);
    return map;
}

/* ------------------------------------------------------------------------------------------------------------ kernels */

#define JOIN_(name, type, isa) name##_##type##_##isa
#define JOIN(name, type, isa) JOIN_(name, type, isa)
/* Stop the compiler from making one multiply-add of a product and what follows. */
#if defined(__x86_64__)
#define KEEP_ROUNDED(vector) __asm__("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP_ROUNDED(vector) __asm__("" : "+w"(vector))
#else
#define KEEP_ROUNDED(vector) __asm__("" : "+m"(vector))
#endif

/* Lanes of two vectors of four, counted on from one to the next. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(one, other, a, b, c, d) __builtin_shufflevector(one, other, a, b, c, d)
#else
typedef int32_t lane_numbers __attribute__((vector_size(16)));
#define SHUFFLE(one, other, a, b, c, d) __builtin_shuffle(one, other, (lane_numbers){a, b, c, d})
#endif

#define ISA portable
#define TARGET
#define VECTOR_BYTES 16
#define CHAINS 1
#include "ms_deform_attn_cpu_kernel.h"
#undef ISA
#undef TARGET
#undef VECTOR_BYTES
#undef CHAINS

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define CHAINS 2
#include "ms_deform_attn_cpu_kernel.h"
#undef ISA
#undef TARGET
#undef VECTOR_BYTES
#undef CHAINS

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define VECTOR_BYTES 64
#define CHAINS 4
#include "ms_deform_attn_cpu_kernel.h"
#undef ISA
#undef TARGET
#undef VECTOR_BYTES
#undef CHAINS
#endif

typedef void run_function(struct call *call);

struct instruction_set {
    const char *name;
    run_function *forward[3], *backward[3]; /* by enum mpformer_type */
};

#define KERNELS(name, isa)                                                                                                     \
    {name,                                                                                                                     \
     {JOIN(run_forward, float32, isa), JOIN(run_forward, bfloat16, isa), JOIN(run_forward, float64, isa)},                     \
     {JOIN(run_backward, float32, isa), JOIN(run_backward, bfloat16, isa), JOIN(run_backward, float64, isa)}}

/* MPFORMER_INSTRUCTION_SET (portable, avx2, avx512) can ask for less than the processor has, for tests and measurements. */
static const struct instruction_set *choose_instruction_set(void)
{
    static const struct instruction_set portable = KERNELS("portable", portable);
#if defined(__x86_64__)
    static const struct instruction_set avx2 = KERNELS("avx2", avx2), avx512 = KERNELS("avx512", avx512);
    const char *wish = getenv("MPFORMER_INSTRUCTION_SET");
    const int any = !wish || !*wish;
    __builtin_cpu_init();
    if ((any || !strcmp(wish, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512;
    if ((any || strcmp(wish, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2;
#endif
    return &portable;
}

/* ------------------------------------------------------------------------------------------------------------- threads */

/* GOMP_parallel of the OpenMP that torch runs on: the interface that GCC, LLVM and Intel all offer. With threads of its own this
 * library would compete with those of torch, which go on spinning for a while after each operator. */
typedef void parallel_function(void (*run)(void *), void *argument, unsigned threads, unsigned flags);

static int find_openmp(struct dl_phdr_info *object, size_t size, void *found)
{
    (void)size;
    const char *path = object->dlpi_name, *name = path ? strrchr(path, '/') : 0;
    name = name ? name + 1 : path;
    if (!name || (strncmp(name, "libgomp", 7) && strncmp(name, "libiomp", 7) && strncmp(name, "libomp", 6)))
        return 0;
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    void *function = library ? dlsym(library, "GOMP_parallel") : 0;
    if (function)
        *(void **)found = function;
    return function && strstr(path, "torch"); /* other packages may have brought an OpenMP of their own */
}

static void work(void *argument)
{
    struct call *call = argument;
    call->run(call);
}

static void *work_in_thread(void *argument)
{
    work(argument);
    return 0;
}

/* Without OpenMP: threads for this call alone. */
static void work_in_own_threads(struct call *call, int threads)
{
    pthread_t others[MAX_THREADS];
    int started = 0;
    while (started < threads - 1 && !pthread_create(&others[started], 0, work_in_thread, call))
        started++;
    work(call);
    while (started > 0)
        pthread_join(others[--started], 0);
}

static void work_together(struct call *call, int threads)
{
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads > call->units)
        threads = (int)call->units;
    if (threads <= 1) {
        work(call);
        return;
    }
    static parallel_function *parallel; /* stays empty until torch has loaded its OpenMP */
    parallel_function *run = __atomic_load_n(&parallel, __ATOMIC_ACQUIRE);
    if (!run) {
        dl_iterate_phdr(find_openmp, &run);
        __atomic_store_n(&parallel, run, __ATOMIC_RELEASE);
    }
    if (run)
        run(work, call, (unsigned)threads, 0);
    else
        work_in_own_threads(call, threads);
}

/* ----------------------------------------------------------------------------------------------------------- interface */

static const struct instruction_set *instruction_set(void)
{
    static const struct instruction_set *chosen;
    const struct instruction_set *set = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (!set) {
        set = choose_instruction_set();
        __atomic_store_n(&chosen, set, __ATOMIC_RELEASE);
    }
    return set;
}

/* Larger maps than this have no exact positions in float32. */
#define MAX_SIDE (1 << 24)

static int check(int type, const struct mpformer_sizes *sizes, struct call *call)
{
    if (type < MPFORMER_FLOAT32 || type > MPFORMER_FLOAT64)
        return MPFORMER_BAD_TYPE;
    if (sizes->levels < 1 || sizes->levels > MPFORMER_MAX_LEVELS || sizes->points < 1 ||
        sizes->points > MPFORMER_MAX_POINTS || sizes->channels < 1 || sizes->channels > MPFORMER_MAX_CHANNELS)
        return MPFORMER_BAD_SIZE;
    memset(call, 0, sizeof *call);
    call->sizes = *sizes;
    int64_t cells = 0;
    for (int64_t level = 0; level < sizes->levels; level++) {
        if (sizes->heights[level] < 0 || sizes->widths[level] < 0 || sizes->heights[level] > MAX_SIDE ||
            sizes->widths[level] > MAX_SIDE)
            return MPFORMER_BAD_SIZE;
        call->first_cell[level] = cells;
        cells += sizes->heights[level] * sizes->widths[level];
        if (pitch_of(call, level) + 2 > call->void_cells)
            call->void_cells = pitch_of(call, level) + 2;
    }
    const int fits = cells == sizes->cells && count_cells(call, 0, sizes->levels) <= INT32_MAX;
    return fits ? MPFORMER_OK : MPFORMER_BAD_SIZE;
}

int mpformer_abi_version(void)
{
    return MPFORMER_ABI_VERSION;
}

const char *mpformer_describe(void)
{
    return instruction_set()->name;
}

const char *mpformer_explain(int status)
{
    switch (status) {
    case MPFORMER_OK:
        return "no error";
    case MPFORMER_BAD_TYPE:
        return "the CPU kernels know float32, bfloat16 and float64 only";
    case MPFORMER_BAD_SIZE:
        return "the CPU kernels handle 1 to 8 levels of at most 16777216 cells a side, 1 to 8 points and 1 to 128 channels a head";
    case MPFORMER_NO_MEMORY:
        return "no memory for the cells of one head";
    default:
        return "unknown error";
    }
}

int mpformer_forward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place, const void *value,
                     const void *locations, const void *weights, void *output)
{
    struct call call;
    const int status = check(type, sizes, &call);
    if (status)
        return status;
    call.value = value, call.locations = locations, call.weights = weights, call.output = output;
    call.run = instruction_set()->forward[type];
    /* Two units a thread, but packing should stay a small part of the work. */
    const int64_t heads = sizes->images * sizes->heads, most_parts = sizes->queries / MIN_QUERIES_A_PART + 1;
    call.parts = heads ? (2 * place->threads + heads - 1) / heads : 1;
    if (call.parts > most_parts)
        call.parts = most_parts;
    call.units = sizes->queries ? heads * call.parts : 0;
    work_together(&call, place->threads);
    return call.status;
}

int mpformer_backward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place,
                      const void *grad_output, const void *value, const void *locations, const void *weights, void *grad_value,
                      void *grad_locations, void *grad_weights)
{
    struct call call;
    const int status = check(type, sizes, &call);
    if (status)
        return status;
    call.grad_output = grad_output, call.value = value, call.locations = locations, call.weights = weights;
    call.grad_value = grad_value, call.grad_locations = grad_locations, call.grad_weights = grad_weights;
    call.run = instruction_set()->backward[type];
    call.units = sizes->images * sizes->heads * sizes->levels;
    work_together(&call, place->threads);
    return call.status;
}
