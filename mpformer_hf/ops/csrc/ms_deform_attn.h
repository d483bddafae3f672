/* Multi-scale deformable attention (Deformable DETR, section 4.1) with a C ABI: no header of torch, no Python.
 *
 * Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
 * All arrays are contiguous:
 *
 *     value      (B, S, N, D)         type
 *     locations  (B, Q, N, L, K, 2)   float, or double if the type is double; (x, y), [0, 1] is inside the level
 *     weights    (B, Q, N, L, K)      like locations
 *     output     (B, Q, N, D)         type
 *
 * A location is at x * width - 0.5, y * height - 0.5 in cells; corners outside of the level count as zero. A location that is
 * not finite makes its output row NaN, and its own gradients.
 */
#ifndef MPFORMER_MS_DEFORM_ATTN_H
#define MPFORMER_MS_DEFORM_ATTN_H

#include <stdint.h>

#define MPFORMER_ABI_VERSION 1
#define MPFORMER_MAX_LEVELS 8
#define MPFORMER_MAX_POINTS 8
#define MPFORMER_MAX_CHANNELS 128

#if defined(_WIN32)
#define MPFORMER_API __declspec(dllexport)
#else
#define MPFORMER_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum mpformer_type { MPFORMER_FLOAT32 = 0, MPFORMER_BFLOAT16 = 1, MPFORMER_FLOAT64 = 2, MPFORMER_FLOAT16 = 3 };

enum mpformer_status {
    MPFORMER_OK = 0,
    MPFORMER_BAD_TYPE = -1,  /* the library has no kernel for this type */
    MPFORMER_BAD_SIZE = -2,  /* an axis is beyond what the library handles */
    MPFORMER_NO_MEMORY = -3, /* scratch space could not be had */
    /* positive: an error of CUDA, see mpformer_explain */
};

struct mpformer_sizes {
    int64_t images, cells, heads, channels, queries, levels, points;
    int64_t heights[MPFORMER_MAX_LEVELS], widths[MPFORMER_MAX_LEVELS]; /* their products sum to `cells` */
};

/* Where and how to run. */
struct mpformer_place {
    int32_t threads; /* CPU: how many to use */
    int32_t device;  /* CUDA: index of the device */
    void *stream;    /* CUDA: the stream */
};

MPFORMER_API int mpformer_abi_version(void);

/* One line for people: CPU the instruction set in use, CUDA the architectures compiled for. */
MPFORMER_API const char *mpformer_describe(void);

/* One line for a status that is not 0. */
MPFORMER_API const char *mpformer_explain(int status);

/* Returns a status. */
MPFORMER_API int mpformer_forward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place,
                                  const void *value, const void *locations, const void *weights, void *output);

/* Gradients are float, or double if the type is double, also that of a half-precision value. `grad_value` must be zero on entry;
 * `grad_locations` and `grad_weights` are written in full. NULL for a gradient that is not needed. */
MPFORMER_API int mpformer_backward(int type, const struct mpformer_sizes *sizes, const struct mpformer_place *place,
                                   const void *grad_output, const void *value, const void *locations, const void *weights,
                                   void *grad_value, void *grad_locations, void *grad_weights);

#ifdef __cplusplus
}
#endif

#endif
