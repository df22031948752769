/* Sixteen floats at a time, on any instruction set: the compiler cuts GNU vectors to the registers there are.
 * An instruction set may provide its own version of a group of functions and define VEC16_OWN_... beforehand. */
#ifndef VEC16_H
#define VEC16_H

#include "vec16_type.h"

#ifndef VEC16_OWN_ARITHMETIC
/* As x86: the second operand if either is NaN. */
INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
INLINE float vf_reduce_max(vf x)
{
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
}
INLINE float vf_reduce_sum(vf x)
{
    float lanes[16];
    vf_store(lanes, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
#endif

/* Nearest integer, ties to even; |x| < 2^22. */
INLINE vf vf_round(vf x)
{
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23 */
    return (x + magic) - magic;
}
/* The integer value of a float that holds one, |x| < 2^22. */
INLINE vm vf_to_int(vf x)
{
    const vf magic = vf_set1(12582912.0f);
    return (vm)(x + magic) - 0x4b400000;
}

INLINE float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    union {
        uint32_t bits;
        float value;
    } u;
    if (magnitude >= 0x7c00)
        u.bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    else if (magnitude >= 0x400)
        u.bits = (magnitude << 13) + 0x38000000;
    else
        u.value = (float)magnitude * 5.9604644775390625e-8f; /* 2^-24 */
    u.bits |= sign;
    return u.value;
}

/* Round to nearest, ties to even. */
INLINE uint16_t float_to_half(float x)
{
    union {
        float value;
        uint32_t bits;
    } u = {x};
    const uint32_t sign = u.bits >> 16 & 0x8000, magnitude = u.bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude >= 0x38800000) return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
    u.bits = magnitude;
    u.value += 0.5f; /* the sum's unit in the last place is 2^-24, as float16's smallest step */
    return (uint16_t)(sign | (u.bits - 0x3f000000));
}

#ifndef VEC16_OWN_HALF
INLINE vf vf_load_half(const uint16_t *p)
{
    vf x;
    for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
    return x;
}
INLINE void vf_store_half(uint16_t *p, vf x)
{
    for (int i = 0; i < 16; i++) p[i] = float_to_half(x[i]);
}
#endif

INLINE vf vf_load_bfloat(const uint16_t *p)
{
    typedef uint16_t half_width __attribute__((vector_size(32)));
    half_width h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vm) << 16);
}
/* Round to nearest, ties to even; NaN stays NaN. */
INLINE void vf_store_bfloat(uint16_t *p, vf x)
{
    typedef uint32_t vu __attribute__((vector_size(64)));
    typedef uint16_t half_width __attribute__((vector_size(32)));
    const vu bits = (vu)x, nan = (vu)(x != x);
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const half_width h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), half_width);
    memcpy(p, &h, sizeof h);
}

#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (vm){__VA_ARGS__})
#endif

/* Lane i gets lane i ^ distance; distance 1, 2, 4 or 8. */
INLINE vf vf_swap(vf x, int distance)
{
    switch (distance) {
    case 1: return SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    case 2: return SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    case 4: return SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    default: return SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    }
}

#endif
