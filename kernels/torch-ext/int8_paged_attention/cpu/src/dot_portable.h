/* Integer dot products in plain C, for processors without a version of their own. */
#include "vec16.h"

/* q and weights in 16 bits: one dot product. */
#define TERMS 1
#define MAX_TILE_ROWS 2
enum { LANES = 16, TERM_BYTES = 8, QUERY_MAX = 32639, WEIGHT_MAX = 32767, KEY_OFFSET = 0 };
#define KEY_SUBTILES(rows) 1
#define VALUE_VECTORS(rows) 1
#define UNROLL_GROUPS /* not at all: 3 to 7 % slower */

typedef struct {
    int32_t lane[16];
} Ints;
typedef struct {
    int8_t byte[64];
} Keys, Values;
typedef struct {
    int16_t word[4];
} Weight;
typedef const uint8_t *Query; /* read where it is used: copies of the struct cost 2 % */

INLINE Ints ints_set1(int32_t x)
{
    Ints r;
    for (int i = 0; i < 16; i++) r.lane[i] = x;
    return r;
}
INLINE Keys load_keys(const int8_t *p)
{
    Keys k;
    memcpy(k.byte, p, 64);
    return k;
}
INLINE Weight load_weight(const uint8_t *w)
{
    Weight r;
    memcpy(r.word, w, 8);
    return r;
}
INLINE Ints dot_values(Ints sum, Weight w, Values v)
{
    for (int i = 0; i < 16; i++)
        sum.lane[i] += w.word[0] * v.byte[4 * i] + w.word[1] * v.byte[4 * i + 1] + w.word[2] * v.byte[4 * i + 2] +
                       w.word[3] * v.byte[4 * i + 3];
    return sum;
}
INLINE Query load_query(const uint8_t *q) { return q; }
INLINE Ints dot_keys(Ints sum, Keys k, Query q) { return dot_values(sum, load_weight(q), k); }
INLINE Values load_values(const int8_t *p) { return load_keys(p); }
INLINE Values load_values_part(const int8_t *p, int lanes)
{
    Values v = {{0}};
    memcpy(v.byte, p, (size_t)lanes * 4);
    return v;
}
INLINE Ints join_terms(Ints whole, Ints same) { return (void)same, whole; }
INLINE void store_ints(float *dst, Ints x)
{
    for (int i = 0; i < 16; i++) dst[i] = (float)x.lane[i];
}
/* dst += factor * x */
INLINE void add_ints(float *dst, Ints x, float factor)
{
    for (int i = 0; i < 16; i++) dst[i] += factor * (float)x.lane[i];
}
/* dst = old * dst + factor * x */
INLINE void accumulate_ints(float *dst, float old, Ints x, float factor)
{
    for (int i = 0; i < 16; i++) dst[i] = old * dst[i] + factor * (float)x.lane[i];
}
/* Sixteen tokens' weights, x * factor in [0, WEIGHT_MAX], 16 bits each. */
INLINE void pack_weights(uint8_t *dst, const float *x, float factor)
{
    const vm whole = vf_to_int(vf_load(x) * factor);
    for (int i = 0; i < 16; i++) {
        const int16_t w = (int16_t)whole[i];
        memcpy(dst + 2 * i, &w, 2);
    }
}
#define WEIGHT_AT(group, term) ((group) * 8)
#define WIDE_PLACE(i) (i) /* where element i of four lies */

/* Registers of the float products in extend_products.h, as there are on most processors: 2 rows by 4 vectors of sums. */
#define FLOAT_ROWS 2
#define FLOAT_VECTORS 4
enum { FLOAT_LANES = 4 };
typedef float Floats __attribute__((vector_size(16)));
INLINE Floats floats_load(const float *p)
{
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE Floats floats_set1(float x) { return (Floats){x, x, x, x}; }
INLINE Floats floats_mul_add(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats floats_max(Floats a, Floats b)
{
    typedef int32_t Mask __attribute__((vector_size(16)));
    const Mask above = a > b;
    return (Floats)((above & (Mask)a) | (~above & (Mask)b));
}
INLINE void floats_store(float *p, Floats x) { memcpy(p, &x, sizeof x); }
