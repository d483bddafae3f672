/* bfloat16 of CUDA on the CPU; see cuda_runtime.h. */
#ifndef CUDA_EMULATION_BF16_H
#define CUDA_EMULATION_BF16_H

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 stored)
{
    const uint32_t bits = (uint32_t)stored.bits << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* To the nearest, ties to even. */
inline __nv_bfloat16 __float2bfloat16_rn(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    if (number != number)
        return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#endif
