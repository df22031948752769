/* Integer dot products of AVX-512 VNNI, and the vec16.h functions that it does better than the compiler. */
#include <immintrin.h>

#include "vec16_type.h"

#define VEC16_OWN_ARITHMETIC
#define VEC16_OWN_HALF

INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE float vf_reduce_max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE float vf_reduce_sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE vf vf_load_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void vf_store_half(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#define VECN_FLOATS 16
#define VECN_OWN_TYPE
#define VECN_OWN_ARITHMETIC
#define VECN_OWN_HALF

typedef __m512 vn;

INLINE vn vn_max(vn a, vn b) { return _mm512_max_ps(a, b); }
INLINE vn vn_mul_add(vn a, vn b, vn c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float vn_reduce_max(vn x) { return _mm512_reduce_max_ps(x); }
INLINE float vn_reduce_sum(vn x) { return _mm512_reduce_add_ps(x); }
INLINE vn vn_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* q and weights in two bytes, high and low: one dot product each. */
#define TERMS 2
#define MAX_TILE_ROWS 4
enum { LANES = 16, TERM_BYTES = 4, QUERY_MAX = 32639, WEIGHT_MAX = 65535, KEY_OFFSET = 128 };
#define KEY_SUBTILES(rows) ((rows) <= 2 ? 4 : 2)
#define VALUE_VECTORS(rows) ((rows) <= 2 ? 4 : 2)
/* One row's products are so short that prefetches come in bursts when their place is in a register: on cold memory
 * 29 GB/s instead of 34 (Zen 5, head_dim 64). */
#define PREFETCH_IN_MEMORY(rows) ((rows) == 1)

typedef __m512i Ints, Keys, Values, Weight;
typedef const uint8_t *Query; /* read where it is used */

INLINE Ints ints_set1(int32_t x) { return _mm512_set1_epi32(x); }
/* Keys are the unsigned operand: k + 128. */
INLINE Keys load_keys(const int8_t *p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
/* In assembly, as GCC 12 copies the sum to and fro and spills q (30 % slower): q is broadcast from memory. */
INLINE Query load_query(const uint8_t *q) { return q; }
INLINE Ints dot_keys(Ints sum, Keys k, Query q)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(k), "m"(*(const int32_t *)q));
    return sum;
}
INLINE Values load_values(const int8_t *p) { return _mm512_loadu_si512(p); }
INLINE Values load_values_part(const int8_t *p, int lanes)
{
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << lanes) - 1), p);
}
INLINE Weight load_weight(const uint8_t *w)
{
    int32_t four;
    memcpy(&four, w, 4);
    return _mm512_set1_epi32(four);
}
INLINE Ints dot_values(Ints sum, Weight w, Values v)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(v));
    return sum;
}
INLINE Ints join_terms(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
INLINE void store_ints(float *dst, Ints x) { _mm512_storeu_ps(dst, _mm512_cvtepi32_ps(x)); }
/* dst += factor * x */
INLINE void add_ints(float *dst, Ints x, float factor)
{
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(factor));
    _mm512_storeu_ps(dst, _mm512_add_ps(_mm512_loadu_ps(dst), scaled));
}
/* dst = old * dst + factor * x */
INLINE void accumulate_ints(float *dst, float old, Ints x, float factor)
{
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(factor));
    _mm512_storeu_ps(dst, _mm512_fmadd_ps(_mm512_loadu_ps(dst), _mm512_set1_ps(old), scaled));
}
/* Sixteen tokens' weights, x * factor in [0, WEIGHT_MAX]: 16 high bytes, 16 low bytes. */
INLINE void pack_weights(uint8_t *dst, const float *x, float factor)
{
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)));
    _mm_storeu_si128((__m128i *)dst, _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128((__m128i *)(dst + 16), _mm512_cvtepi32_epi8(whole));
}
#define WEIGHT_AT(group, term) ((term) * 16 + (group) * 4)

/* Registers of the float products in extend_products.h: 6 rows by 4 vectors of sums, 4 of B, one of A. */
#define FLOAT_ROWS 6
#define FLOAT_VECTORS 4
enum { FLOAT_LANES = 16 };
typedef __m512 Floats;
INLINE Floats floats_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE Floats floats_set1(float x) { return _mm512_set1_ps(x); }
INLINE Floats floats_mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats floats_max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE void floats_store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
