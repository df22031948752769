/* The two integer products of decode attention, q . K and weights . V, with the next tile fetched meanwhile. */
#include "decode_state.h"

/* Loops over registers: unrolled before registers are assigned. */
#define UNROLL _Pragma("GCC unroll 16")

#ifndef UNROLL_GROUPS
#define UNROLL_GROUPS UNROLL /* of the four groups of tokens in a subtile */
#endif
#ifndef PREFETCH_IN_MEMORY
#define PREFETCH_IN_MEMORY(rows) 0 /* where the place of the prefetches is kept while a tile is worked on */
#endif

/* Fetches the next tile line by line, in the order of addresses, while this one is worked on: it may lie anywhere in
 * the pool. One thread on cold memory, 8 heads of head_dim 64, group 1: 30 GB/s, and 24 when fetched in the order of
 * use; a tile earlier is no better, without prefetching it is 10 to 16.
 * Into the second-level cache: that was no better on the processor of these figures, but on a Zen 4 the first level seems
 * to have too few places for lines on their way to cover the latency of memory. There 64 tokens of head_dim 128 with 4
 * query rows take 0.81 us with AVX-512 VNNI, 1.74 us when fetched into the first level, 0.76 us when they were in the
 * cache all along. */
typedef struct {
    const int8_t *line, *end; /* of a run of lines */
    int64_t stride;
    const Tile *tile;
    int64_t key_stride, key_bytes, value_bytes; /* of a subtile */
    int run;                                    /* keys of all subtiles, then their values */
} Prefetch;

/* Inlined: a call inside the products' loops would cost them all their registers. */
INLINE void next_run(Prefetch *p)
{
    const int count = p->tile->count, run = p->run++;
    if (run < count) {
        p->line = p->tile->k[run];
        p->stride = p->key_stride;
        p->end = p->line + p->key_bytes;
    } else if (run < 2 * count) {
        p->line = p->tile->v[run - count];
        p->stride = 64;
        p->end = p->line + p->value_bytes;
    } else { /* done: the same line again and again */
        p->stride = 0;
        p->end = NULL;
    }
}

INLINE void prefetch_line(Prefetch *p)
{
    __builtin_prefetch(p->line, 0, 2);
    p->line += p->stride;
    if (__builtin_expect(p->line == p->end, 0)) next_run(p);
}

static Prefetch start_prefetch(const Tile *tile, const Layer *layer)
{
    const int64_t stride = layer->block_size * 4;
    Prefetch p = {.line = (const int8_t *)layer, .tile = tile, .key_stride = stride,
                  .key_bytes = layer->head_dim / 4 * stride, .value_bytes = SUBTILE * layer->v_head_dim};
    next_run(&p);
    return p;
}

/* Integer products of `rows` query rows with `subtiles` subtiles from s on; terms from `term` on. */
INLINE void key_products(const State *st, int r0, const Tile *tile, Prefetch *prefetch, int s, int64_t step_bytes,
                         float (*scores)[TILE_TOKENS], const int rows, const int subtiles, const int term,
                         const int terms)
{
    enum { VECTORS = SUBTILE / LANES };
    Ints sum[MAX_TILE_ROWS][4][VECTORS][TERMS];
    const int64_t bytes = st->head_dim / 4 * step_bytes;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int u = 0; u < subtiles; u++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                UNROLL for (int t = 0; t < terms; t++)
                    sum[r][u][v][t] = ints_set1(KEY_OFFSET ? st->offset[r0 + r][term + t] : 0);
    const uint8_t *q = st->q[r0][term];
    const int8_t *keys[4];
    UNROLL for (int u = 0; u < subtiles; u++) keys[u] = tile->k[s + u];
    for (int64_t at = 0; at < bytes; at += step_bytes, q += TERM_BYTES)
        UNROLL for (int u = 0; u < subtiles; u++) {
            prefetch_line(prefetch);
            Keys k[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) k[v] = load_keys(keys[u] + at + v * LANES * 4);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int t = 0; t < terms; t++) {
                    const Query query = load_query(q + r * sizeof st->q[0] + t * sizeof st->q[0][0]);
                    UNROLL for (int v = 0; v < VECTORS; v++) sum[r][u][v][t] = dot_keys(sum[r][u][v][t], k[v], query);
                }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int u = 0; u < subtiles; u++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                float *dst = scores[r] + (s + u) * SUBTILE + v * LANES;
                if (term == TERMS)
                    add_ints(dst, sum[r][u][v][0], 1.0f / REST_STEPS);
                else
                    store_ints(dst, join_terms(sum[r][u][v][0], sum[r][u][v][TERMS - 1]));
            }
}

/* out = old * out + factor * (weights . V), `vectors` vectors of values at dimension d. */
INLINE void value_products(State *st, int r0, const Tile *tile, Prefetch *prefetch, int64_t d,
                           uint8_t (*weights)[TILE_SUBTILES][32], const float *old, const float *factor,
                           const int rows, const int vectors, const int part)
{
    Ints sum[MAX_TILE_ROWS][4][TERMS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++)
            UNROLL for (int t = 0; t < TERMS; t++) sum[r][j][t] = ints_set1(0);
    for (int s = 0; s < tile->count; s++)
        UNROLL_GROUPS for (int g = 0; g < SUBTILE / 4; g++) {
            const int64_t at = (g * st->v_head_dim + d) * 4;
            Values v[4];
            UNROLL for (int j = 0; j < vectors; j++) {
                if (j * LANES % 16 == 0) prefetch_line(prefetch);
                v[j] = part ? load_values_part(tile->v[s] + at, part) : load_values(tile->v[s] + at + j * LANES * 4);
            }
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int t = 0; t < TERMS; t++) {
                    const Weight w = load_weight(weights[r][s] + WEIGHT_AT(g, t));
                    UNROLL for (int j = 0; j < vectors; j++) sum[r][j][t] = dot_values(sum[r][j][t], w, v[j]);
                }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++) {
            const Ints both = join_terms(sum[r][j][0], sum[r][j][TERMS - 1]);
            accumulate_ints(st->out[r0 + r] + d + j * LANES, old[r], both, factor[r]);
        }
}
