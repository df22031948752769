/* Exponentials and masks of sixteen lanes, for the softmax of extend_softmax.h; decode has its own, a register wide, in
 * vecn.h. */
#ifndef VEC16_EXP_H
#define VEC16_EXP_H

#include "vec16.h"
#include "vecn.h"

#if VECN_FLOATS == 16
INLINE vf vf_mul_add(vf a, vf b, vf c) { return (vf)vn_mul_add((vn)a, (vn)b, (vn)c); }
#elif VECN_FLOATS == 8
INLINE vf vf_mul_add(vf a, vf b, vf c)
{
    const Halves x = {a}, y = {b}, z = {c};
    return (Halves){.half = {vn_mul_add(x.half[0], y.half[0], z.half[0]), vn_mul_add(x.half[1], y.half[1], z.half[1])}}
        .whole;
}
#else
INLINE vf vf_mul_add(vf a, vf b, vf c) { return a * b + c; }
#endif

/* 2^x for x <= 0 to 2e-7 relative; exactly 0 below -126.5. */
INLINE vf vf_exp2(vf x)
{
    x = vf_max(x, vf_set1(-127.0f));
    const vf whole = vf_round(x);
    const vf r = x - whole;
    vf y = vf_set1(1.535336188319500e-4f);
    y = vf_mul_add(y, r, vf_set1(1.339887440266574e-3f));
    y = vf_mul_add(y, r, vf_set1(9.618437357674640e-3f));
    y = vf_mul_add(y, r, vf_set1(5.550332471162809e-2f));
    y = vf_mul_add(y, r, vf_set1(2.402264791363012e-1f));
    y = vf_mul_add(y, r, vf_set1(6.931472028550421e-1f));
    y = vf_mul_add(y, r, vf_set1(1.0f));
    return y * (vf)((vf_to_int(whole) + 127) << 23);
}

INLINE vf vf_tanh(vf x)
{
    const vf e = vf_exp2(vf_abs(x) * -2.8853900817779268f); /* exp(-2|x|) */
    const vf t = (1.0f - e) / (1.0f + e);
    return (vf)((vm)t | ((vm)x & (int32_t)0x80000000));
}

/* Lane i of the mask is set where bit i is. */
INLINE vm vm_from_bits(uint32_t bits)
{
    const vm lane_bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (((vm){0} + (int32_t)bits) & lane_bit) != 0;
}
INLINE uint32_t vm_to_bits(vm mask)
{
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
}

#endif
