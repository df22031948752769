/* Float products of a tile of query rows: scores = Q . K and out = old * out + weights . V. Both have the same form,
 * C [rows][columns] (+)= A [rows][depth] * B [depth][columns], with B in the first or second-level cache. */
#include "rows.h"
#include "vec16_exp.h"

/* `rows` rows and `vectors` registers of columns; every sum stays in its register. */
INLINE void multiply_block(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                           int64_t depth, const float *old, const int rows, const int vectors)
{
    Floats sum[FLOAT_ROWS][FLOAT_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            const Floats none = floats_set1(0);
            sum[r][v] = none;
            if (old) sum[r][v] = floats_mul_add(floats_set1(old[r]), floats_load(c + r * c_stride + v * FLOAT_LANES), none);
        }
    for (int64_t i = 0; i < depth; i++, b += b_stride) {
        Floats columns[FLOAT_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) columns[v] = floats_load(b + v * FLOAT_LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const Floats x = floats_set1(a[r * a_stride + i]);
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = floats_mul_add(x, columns[v], sum[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) floats_store(c + r * c_stride + v * FLOAT_LANES, sum[r][v]);
}

/* One product: strides in floats; `columns` is a multiple of 16. `old`: factors on the rows of C, NULL overwrites it. */
typedef struct {
    float *c;
    const float *a, *b, *old;
    int64_t c_stride, a_stride, b_stride, depth, columns;
} Product;

INLINE void multiply_rows(const Product *p, int64_t row, const int rows)
{
    enum { WIDE = FLOAT_VECTORS * FLOAT_LANES, NARROW = SUBTILE / FLOAT_LANES };
    float *c = p->c + row * p->c_stride;
    const float *a = p->a + row * p->a_stride, *old = p->old ? p->old + row : NULL;
    int64_t i = 0;
    for (; i + WIDE <= p->columns; i += WIDE)
        multiply_block(c + i, p->c_stride, a, p->a_stride, p->b + i, p->b_stride, p->depth, old, rows, FLOAT_VECTORS);
    for (; i < p->columns; i += SUBTILE)
        multiply_block(c + i, p->c_stride, a, p->a_stride, p->b + i, p->b_stride, p->depth, old, rows, NARROW);
}

#define MULTIPLY_ROWS(n) \
    static __attribute__((noinline)) void multiply_rows_##n(const Product *p, int64_t row) { multiply_rows(p, row, n); }
MULTIPLY_ROWS(1)
MULTIPLY_ROWS(2)
#if FLOAT_ROWS > 2
MULTIPLY_ROWS(3)
MULTIPLY_ROWS(4)
#endif
#if FLOAT_ROWS > 4
MULTIPLY_ROWS(5)
MULTIPLY_ROWS(6)
#endif

/* All rows, in groups of FLOAT_ROWS or one fewer where they are enough for that. */
static void multiply(const Product *p, int64_t rows)
{
    const int64_t groups = ceil_div(rows, FLOAT_ROWS);
    for (int64_t i = 0; i < groups; i++) {
        const int64_t from = rows * i / groups, to = rows * (i + 1) / groups;
        switch (to - from) {
        case 1: multiply_rows_1(p, from); break;
#if FLOAT_ROWS > 2
        case 3: multiply_rows_3(p, from); break;
        case 4: multiply_rows_4(p, from); break;
#endif
#if FLOAT_ROWS > 4
        case 5: multiply_rows_5(p, from); break;
        case 6: multiply_rows_6(p, from); break;
#endif
        default: multiply_rows_2(p, from);
        }
    }
}
