/* Integer dot products of Arm's SDOT, and the vec16.h functions that need its instructions. */
#include <arm_neon.h>

#include "vec16_type.h"

#define VEC16_OWN_HALF
#define VECN_OWN_TYPE
#define VECN_OWN_HALF

typedef float32x4_t vn;

INLINE vf vf_load_half(const uint16_t *p)
{
    float lanes[16];
    for (int i = 0; i < 16; i += 4) vst1q_f32(lanes + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))));
    return vf_load(lanes);
}
INLINE vn vn_load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void vf_store_half(uint16_t *p, vf x)
{
    float lanes[16];
    vf_store(lanes, x);
    for (int i = 0; i < 16; i += 4) vst1_u16(p + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(lanes + i))));
}

#include "vec16.h"

/* q and weights in two signed bytes, high and low: one dot product each. */
#define TERMS 2
#define MAX_TILE_ROWS 3
enum { LANES = 4, TERM_BYTES = 4, QUERY_MAX = 32639, WEIGHT_MAX = 32639, KEY_OFFSET = 0 };
#define KEY_SUBTILES(rows) 1
#define VALUE_VECTORS(rows) 4

typedef int32x4_t Ints;
typedef int8x16_t Keys, Query, Values, Weight;

INLINE Ints ints_set1(int32_t x) { return vdupq_n_s32(x); }
INLINE Keys load_keys(const int8_t *p) { return vld1q_s8(p); }
INLINE Weight load_weight(const uint8_t *w)
{
    int32_t four;
    memcpy(&four, w, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
INLINE Query load_query(const uint8_t *q) { return load_weight(q); }
INLINE Ints dot_keys(Ints sum, Keys k, Query q) { return vdotq_s32(sum, k, q); }
INLINE Values load_values(const int8_t *p) { return vld1q_s8(p); }
INLINE Values load_values_part(const int8_t *p, int lanes) { return (void)lanes, vld1q_s8(p); } /* dims come in fours */
INLINE Ints dot_values(Ints sum, Weight w, Values v) { return vdotq_s32(sum, w, v); }
INLINE Ints join_terms(Ints high, Ints low) { return vaddq_s32(vshlq_n_s32(high, 8), low); }
INLINE void store_ints(float *dst, Ints x) { vst1q_f32(dst, vcvtq_f32_s32(x)); }
/* dst += factor * x */
INLINE void add_ints(float *dst, Ints x, float factor)
{
    vst1q_f32(dst, vaddq_f32(vld1q_f32(dst), vmulq_n_f32(vcvtq_f32_s32(x), factor)));
}
/* dst = old * dst + factor * x */
INLINE void accumulate_ints(float *dst, float old, Ints x, float factor)
{
    vst1q_f32(dst, vaddq_f32(vmulq_n_f32(vld1q_f32(dst), old), vmulq_n_f32(vcvtq_f32_s32(x), factor)));
}
/* Sixteen tokens' weights, x * factor in [0, WEIGHT_MAX]: 16 high bytes, 16 low bytes, as x = 256 * high + low. */
INLINE void pack_weights(uint8_t *dst, const float *x, float factor)
{
    typedef int8_t bytes __attribute__((vector_size(16)));
    const vm whole = vf_to_int(vf_load(x) * factor), high = (whole + 128) >> 8;
    const bytes h = __builtin_convertvector(high, bytes), l = __builtin_convertvector(whole - 256 * high, bytes);
    memcpy(dst, &h, 16);
    memcpy(dst + 16, &l, 16);
}
#define WEIGHT_AT(group, term) ((term) * 16 + (group) * 4)

/* Registers of the float products in extend_products.h: 4 rows by 4 vectors of sums, 4 of B, one of A. */
#define FLOAT_ROWS 4
#define FLOAT_VECTORS 4
enum { FLOAT_LANES = 4 };
typedef float32x4_t Floats;
INLINE Floats floats_load(const float *p) { return vld1q_f32(p); }
INLINE Floats floats_set1(float x) { return vdupq_n_f32(x); }
INLINE Floats floats_mul_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
INLINE Floats floats_max(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE void floats_store(float *p, Floats x) { vst1q_f32(p, x); }
