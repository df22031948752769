/* As many floats as one register holds, for the loops over a tile's scores: where `vf` of vec16.h takes two registers,
 * GCC 12 moves it through memory, element by element. An instruction set may define VECN_FLOATS, and provide its own
 * version of a group of functions and define VECN_OWN_... beforehand. */
#ifndef VECN_H
#define VECN_H

#include "vec16.h"

#ifndef VECN_FLOATS
#define VECN_FLOATS 4
#endif
#ifndef VECN_OWN_TYPE
typedef float vn __attribute__((vector_size(4 * VECN_FLOATS)));
#endif
typedef int32_t vni __attribute__((vector_size(4 * VECN_FLOATS))); /* integers, or a mask of 0 and -1 */

INLINE vn vn_load(const float *p)
{
    vn x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vn_store(float *p, vn x) { memcpy(p, &x, sizeof x); }
INLINE vn vn_set1(float x) { return x - (vn){0}; }
INLINE vn vn_select(vni mask, vn a, vn b) { return (vn)((mask & (vni)a) | (~mask & (vni)b)); }

#ifndef VECN_OWN_ARITHMETIC
/* As x86: the second operand if either is NaN. */
INLINE vn vn_max(vn a, vn b) { return vn_select(a > b, a, b); }
INLINE vn vn_mul_add(vn a, vn b, vn c) { return a * b + c; }
INLINE float vn_reduce_max(vn x)
{
    float m = x[0];
    for (int i = 1; i < VECN_FLOATS; i++) m = x[i] > m ? x[i] : m;
    return m;
}
INLINE float vn_reduce_sum(vn x)
{
    float sum = x[0];
    for (int i = 1; i < VECN_FLOATS; i++) sum += x[i];
    return sum;
}
#endif
#ifndef VECN_OWN_HALF
INLINE vn vn_load_half(const uint16_t *p)
{
    vn x;
    for (int i = 0; i < VECN_FLOATS; i++) x[i] = half_to_float(p[i]);
    return x;
}
#endif

/* Lane i of the mask is set where bit i is. */
INLINE vni vn_mask(uint32_t bits)
{
    static const int32_t lane_bits[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                          256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    vni lane_bit;
    memcpy(&lane_bit, lane_bits, sizeof lane_bit);
    return (((vni){0} + (int32_t)bits) & lane_bit) != 0;
}

/* 2^x for x <= 0 to 2e-7 relative; exactly 0 from -127 down, and some number below 2^-126 from there to -126. */
INLINE vn vn_exp2(vn x)
{
    const vn magic = vn_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits */
    x = vn_max(x, vn_set1(-127.0f));
    const vn shifted = x + magic;
    const vn r = x - (shifted - magic);
    vn y = vn_set1(1.535336188319500e-4f);
    y = vn_mul_add(y, r, vn_set1(1.339887440266574e-3f));
    y = vn_mul_add(y, r, vn_set1(9.618437357674640e-3f));
    y = vn_mul_add(y, r, vn_set1(5.550332471162809e-2f));
    y = vn_mul_add(y, r, vn_set1(2.402264791363012e-1f));
    y = vn_mul_add(y, r, vn_set1(6.931472028550421e-1f));
    y = vn_mul_add(y, r, vn_set1(1.0f));
    /* The exponent grows by the integer: of `magic` itself nothing is left after the shift. */
    return (vn)((vni)y + ((vni)shifted << 23));
}

INLINE vn vn_tanh(vn x)
{
    const vn size = (vn)((vni)x & 0x7fffffff);
    const vn e = vn_exp2(size * -2.8853900817779268f); /* exp(-2|x|) */
    const vn t = (1.0f - e) / (1.0f + e);
    return (vn)((vni)t | ((vni)x & (int32_t)0x80000000));
}

#endif
