/* Integer dot products of AVX-VNNI, 256 bits wide. */
#include "vec16_avx2.h"

/* q and weights in two bytes, high and low: one dot product each. */
#define TERMS 2
#define MAX_TILE_ROWS 3
enum { TERM_BYTES = 4, QUERY_MAX = 32639, WEIGHT_MAX = 65535, KEY_OFFSET = 128 };
#define KEY_SUBTILES(rows) ((rows) == 1 ? 2 : 1)
#define VALUE_VECTORS(rows) ((rows) == 1 ? 4 : 2)

typedef __m256i Keys, Query, Values, Weight;

/* Keys are the unsigned operand: k + 128. */
INLINE Keys load_keys(const int8_t *p)
{
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8(-128));
}
INLINE Weight load_weight(const uint8_t *w) { return broadcast_word(w); }
INLINE Query load_query(const uint8_t *q) { return broadcast_word(q); }
/* In assembly, as GCC 12 copies sums to and fro. */
INLINE Ints dot_bytes(Ints sum, __m256i unsigned_bytes, __m256i signed_bytes)
{
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
    return sum;
}
INLINE Ints dot_keys(Ints sum, Keys k, Query q) { return dot_bytes(sum, k, q); }
INLINE Values load_values(const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE Values load_values_part(const int8_t *p, int lanes) { return load_groups(p, lanes); }
INLINE Ints dot_values(Ints sum, Weight w, Values v) { return dot_bytes(sum, w, v); }
INLINE Ints join_terms(Ints high, Ints low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
/* Sixteen tokens' weights, x * factor in [0, WEIGHT_MAX]: high and low bytes, in the order that packing leaves. */
INLINE void pack_weights(uint8_t *dst, const float *x, float factor)
{
    const __m256i words = _mm256_packus_epi32(round_scaled(x, factor), round_scaled(x + 8, factor));
    const __m256i high = _mm256_srli_epi16(words, 8), low = _mm256_and_si256(words, _mm256_set1_epi16(255));
    _mm256_storeu_si256((__m256i *)dst, _mm256_packus_epi16(high, low));
}
#define WEIGHT_AT(group, term) ((group) % 2 * 16 + (term) * 8 + (group) / 2 * 4)
