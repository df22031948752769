/* Integer dot products of AVX2 without VNNI: 16-bit products (vpmaddwd) of even and odd bytes. */
#include "vec16_avx2.h"

/* q and weights in 16 bits: one dot product. */
#define TERMS 1
#define MAX_TILE_ROWS 4
enum { TERM_BYTES = 8, QUERY_MAX = 32639, WEIGHT_MAX = 32767, KEY_OFFSET = 0 };
#define KEY_SUBTILES(rows) ((rows) == 1 ? 2 : 1)
#define VALUE_VECTORS(rows) ((rows) == 1 ? 4 : 2)

/* Of each group of four bytes: elements 0 and 2, and 1 and 3, as 16-bit integers. */
typedef struct {
    __m256i even, odd;
} Keys, Query, Values, Weight;

/* The even bytes by a product with 1 and 0, one instruction: two shifts were 2 to 4 % slower. */
INLINE Values widen(__m256i groups)
{
    return (Values){_mm256_maddubs_epi16(_mm256_set1_epi16(1), groups), _mm256_srai_epi16(groups, 8)};
}
INLINE Keys load_keys(const int8_t *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE Values load_values(const int8_t *p) { return load_keys(p); }
INLINE Values load_values_part(const int8_t *p, int lanes) { return widen(load_groups(p, lanes)); }
INLINE Weight load_weight(const uint8_t *w) { return (Weight){broadcast_word(w), broadcast_word(w + 4)}; }
/* In assembly, as GCC 12 adds in another order and then keeps most sums in memory. */
INLINE void add_to(Ints *sum, Ints x) { __asm__("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(x)); }
INLINE Ints dot_values(Ints sum, Weight w, Values v)
{
    add_to(&sum, _mm256_madd_epi16(w.even, v.even));
    add_to(&sum, _mm256_madd_epi16(w.odd, v.odd));
    return sum;
}
INLINE Query load_query(const uint8_t *q) { return load_weight(q); }
INLINE Ints dot_keys(Ints sum, Keys k, Query q) { return dot_values(sum, q, k); }
INLINE Ints join_terms(Ints whole, Ints same) { return (void)same, whole; }
/* Sixteen tokens' weights, x * factor in [0, WEIGHT_MAX], 16 bits each; of each four, the order is 0, 2, 1, 3, and the
 * fours lie in the order that packing leaves. */
INLINE void pack_weights(uint8_t *dst, const float *x, float factor)
{
    const __m256i words = _mm256_packs_epi32(round_scaled(x, factor), round_scaled(x + 8, factor));
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256((__m256i *)dst, _mm256_shuffle_epi8(words, order));
}
#define WEIGHT_AT(group, term) ((group) % 2 * 16 + (group) / 2 * 8)
#define WIDE_PLACE(i) (((i) & 1) << 1 | (i) >> 1) /* where element i of four lies */
