/* float16 of CUDA on the CPU; see cuda_runtime.h. */
#ifndef CUDA_EMULATION_FP16_H
#define CUDA_EMULATION_FP16_H

#include <math.h>
#include <stdint.h>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half half)
{
    const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    float magnitude = exponent ? ldexpf((float)(fraction + 1024), exponent - 25) : ldexpf((float)fraction, -24);
    if (exponent == 31)
        magnitude = fraction ? NAN : INFINITY;
    return half.bits >> 15 ? -magnitude : magnitude;
}

/* To the nearest, ties to even. */
inline __half __float2half_rn(float number)
{
    const uint16_t sign = signbit(number) ? 0x8000 : 0;
    const float magnitude = fabsf(number);
    if (isnan(number))
        return {(uint16_t)(sign | 0x7e00)};
    if (magnitude >= 65520.0f) /* half a step above the largest */
        return {(uint16_t)(sign | 0x7c00)};
    int exponent; /* magnitude = [0.5, 1) * 2^exponent */
    frexpf(magnitude, &exponent);
    if (magnitude == 0 || exponent < -13) /* steps of 2^-24 */
        return {(uint16_t)(sign | (int)nearbyintf(ldexpf(magnitude, 24)))};
    const int steps = (int)nearbyintf(ldexpf(magnitude, 11 - exponent)); /* 1024 to 2048, which carries into the exponent */
    return {(uint16_t)(sign | (((exponent + 13) << 10) + steps))};
}

#endif
