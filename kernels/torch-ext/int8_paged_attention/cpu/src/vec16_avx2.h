/* vec16.h functions for processors with AVX2, FMA and F16C: two registers of eight floats. */
#include <immintrin.h>

#include "vec16_type.h"

#define VEC16_OWN_ARITHMETIC
#define VEC16_OWN_HALF

typedef union {
    vf whole;
    __m256 half[2];
} Halves;

INLINE vf vf_max(vf a, vf b)
{
    const Halves x = {a}, y = {b};
    return (Halves){.half = {_mm256_max_ps(x.half[0], y.half[0]), _mm256_max_ps(x.half[1], y.half[1])}}.whole;
}
INLINE vf vf_min(vf a, vf b)
{
    const Halves x = {a}, y = {b};
    return (Halves){.half = {_mm256_min_ps(x.half[0], y.half[0]), _mm256_min_ps(x.half[1], y.half[1])}}.whole;
}
INLINE vf vf_load_half(const uint16_t *p)
{
    const __m128i low = _mm_loadu_si128((const __m128i *)p), high = _mm_loadu_si128((const __m128i *)(p + 8));
    return (Halves){.half = {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)}}.whole;
}
INLINE void vf_store_half(uint16_t *p, vf a)
{
    const Halves x = {a};
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.half[0], NEAREST));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.half[1], NEAREST));
}

#define VECN_FLOATS 8
#define VECN_OWN_TYPE
#define VECN_OWN_ARITHMETIC
#define VECN_OWN_HALF

typedef __m256 vn;

INLINE vn vn_max(vn a, vn b) { return _mm256_max_ps(a, b); }
INLINE vn vn_mul_add(vn a, vn b, vn c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vn vn_load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE float vn_reduce_max(vn eight)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE float vn_reduce_sum(vn eight)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE float vf_reduce_max(vf a)
{
    const Halves x = {a};
    return vn_reduce_max(_mm256_max_ps(x.half[0], x.half[1]));
}
INLINE float vf_reduce_sum(vf a)
{
    const Halves x = {a};
    return vn_reduce_sum(_mm256_add_ps(x.half[0], x.half[1]));
}

enum { LANES = 8 };
typedef __m256i Ints;

INLINE Ints ints_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE void store_ints(float *dst, Ints x) { _mm256_storeu_ps(dst, _mm256_cvtepi32_ps(x)); }
/* dst += factor * x */
INLINE void add_ints(float *dst, Ints x, float factor)
{
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(factor));
    _mm256_storeu_ps(dst, _mm256_add_ps(_mm256_loadu_ps(dst), scaled));
}
/* dst = old * dst + factor * x */
INLINE void accumulate_ints(float *dst, float old, Ints x, float factor)
{
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(factor));
    _mm256_storeu_ps(dst, _mm256_fmadd_ps(_mm256_loadu_ps(dst), _mm256_set1_ps(old), scaled));
}
/* Eight floats times a factor, to the nearest integers. */
INLINE __m256i round_scaled(const float *x, float factor)
{
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(factor)));
}
/* Four bytes in every lane. */
INLINE __m256i broadcast_word(const uint8_t *p)
{
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}
/* The first `lanes` (4) of eight groups of four bytes, the others 0. */
INLINE __m256i load_groups(const int8_t *p, int lanes)
{
    return _mm256_maskload_epi32((const int *)p, _mm256_setr_epi32(-(lanes > 0), -(lanes > 1), -(lanes > 2), -(lanes > 3),
                                                                   -(lanes > 4), -(lanes > 5), -(lanes > 6), 0));
}

/* Registers of the float products in extend_products.h: 6 rows by 2 vectors of sums, 2 of B, one of A. */
#define FLOAT_ROWS 6
#define FLOAT_VECTORS 2
enum { FLOAT_LANES = 8 };
typedef __m256 Floats;
INLINE Floats floats_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE Floats floats_set1(float x) { return _mm256_set1_ps(x); }
INLINE Floats floats_mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats floats_max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE void floats_store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
