/* Between the two products: scores, and the weights of an online softmax, of one query row over one tile. */
#include "decode_products.h"

/* Scales of a tile as floats, and what they say about the way to go. */
typedef struct {
    _Alignas(64) float k[TILE_TOKENS], v[TILE_TOKENS]; /* 0 where no row sees the token, or where it is faulty */
    uint32_t faulty[TILE_SUBTILES];                    /* tokens whose key or value held NaN or infinity */
    int plain;                                         /* every row sees every token, and none is faulty */
    int refine;                                        /* scores need the rest term of q */
} Scales;

/* Bits of the tokens [first, last) of the subtile at `position`. */
INLINE uint32_t token_range(int64_t first, int64_t last, int64_t position)
{
    const int64_t from = max_i64(first - position, 0), to = min_i64(last - position, SUBTILE);
    return from < to ? (1u << to) - (1u << from) : 0;
}

/* Scales that are NaN become 0, and their tokens faulty. */
static __attribute__((noinline)) void note_faults(const Tile *tile, Scales *scales)
{
    for (int i = 0; i < tile->count * SUBTILE; i++)
        if (scales->k[i] != scales->k[i] || scales->v[i] != scales->v[i]) {
            scales->faulty[i / SUBTILE] |= 1u << i % SUBTILE;
            scales->k[i] = scales->v[i] = 0;
        }
}

static void load_scales(const State *st, const Tile *tile, Scales *scales)
{
    const int tokens = tile->count * SUBTILE;
    vn largest = {0}, zero = {0};
    scales->plain = !st->any_faulty_query && !st->capped && tile->position[0] >= st->latest_first &&
                    tile->position[tile->count - 1] + SUBTILE <= st->earliest_last;
    for (int s = 0; s < tile->count; s++) {
        scales->faulty[s] = 0;
        scales->plain &= tile->admitted[s] == 0xffff;
        for (int i = 0; i < SUBTILE; i += VECN_FLOATS) {
            vn_store(scales->k + s * SUBTILE + i, vn_load_half(tile->k_scales[s] + i));
            vn_store(scales->v + s * SUBTILE + i, vn_load_half(tile->v_scales[s] + i));
        }
    }
    if (!scales->plain)
        for (int i = 0; i < tokens; i += VECN_FLOATS) {
            const int s = i / SUBTILE;
            const uint32_t in_range = token_range(st->earliest_first, st->latest_last, tile->position[s]);
            const vni seen = vn_mask((tile->admitted[s] & in_range) >> i % SUBTILE);
            vn_store(scales->k + i, (vn)((vni)vn_load(scales->k + i) & seen));
            vn_store(scales->v + i, (vn)((vni)vn_load(scales->v + i) & seen));
        }
    for (int i = 0; i < tokens; i += VECN_FLOATS) {
        const vn k = vn_load(scales->k + i), v = vn_load(scales->v + i);
        largest = vn_max(k, largest);
        zero += k * 0.0f + v * 0.0f; /* NaN where a scale is */
    }
    if (vn_reduce_sum(zero) != 0) {
        scales->plain = 0;
        note_faults(tile, scales);
        largest = vn_set1(0);
        for (int i = 0; i < tokens; i += VECN_FLOATS) largest = vn_max(vn_load(scales->k + i), largest);
    }
    scales->refine = vn_reduce_max(largest) * st->error_per_scale > SCORE_TOLERANCE;
}

/* Tokens of a subtile that row r sees and that are sound; notes a fault that it sees. */
static uint32_t visible_tokens(State *st, int r, const Tile *tile, const Scales *scales, int s)
{
    const uint32_t seen = token_range(st->first[r], st->last[r], tile->position[s]) & tile->admitted[s];
    st->fault[r] |= (seen & scales->faulty[s]) || (seen && st->faulty_query[r]);
    return seen & ~scales->faulty[s];
}

/* Integer products -> scores, one row, with masks, softcap and the centre; the slow way. Returns the largest. */
static __attribute__((noinline)) float general_scores(State *st, int r, const Tile *tile, const Scales *scales,
                                                       float *scores)
{
    vn largest = vn_set1(-INFINITY);
    for (int s = 0; s < tile->count; s++) {
        const uint32_t visible = visible_tokens(st, r, tile, scales, s);
        for (int i = s * SUBTILE; i < (s + 1) * SUBTILE; i += VECN_FLOATS) {
            vn x = vn_load(scores + i) * vn_load(scales->k + i) * st->factor[r] + st->center_score[r];
            if (st->capped) x = vn_tanh(x / st->softcap) * (st->softcap * LOG2_E);
            x = vn_select(vn_mask(visible >> i % SUBTILE), x, vn_set1(-INFINITY));
            vn_store(scores + i, x);
            largest = vn_max(x, largest);
        }
    }
    return vn_reduce_max(largest);
}

/* Integer products -> scores of one row. Returns the largest. */
INLINE float scale_scores(State *st, int r, const Tile *tile, const Scales *scales, float *scores)
{
    if (!scales->plain) return general_scores(st, r, tile, scales, scores);
    const vn f = vn_set1(st->factor[r]), c = vn_set1(st->center_score[r]);
    vn largest = vn_set1(-INFINITY);
    for (int i = 0; i < tile->count * SUBTILE; i += VECN_FLOATS) {
        const vn x = vn_mul_add(vn_load(scores + i) * vn_load(scales->k + i), f, c);
        vn_store(scores + i, x);
        largest = vn_max(x, largest);
    }
    return vn_reduce_max(largest);
}

/* Online softmax of one row whose largest score is `most`: scores -> weights times V scales. Returns the largest of
 * these; *old is the factor on what was summed before. */
INLINE float weigh_scores(State *st, int r, const Tile *tile, const Scales *scales, float *scores, float most,
                          float *old)
{
    const float highest = larger(st->highest[r], most);
    const float reference = highest == -INFINITY ? 0.0f : highest;
    *old = vn_exp2(vn_set1(st->highest[r] - reference))[0];
    st->highest[r] = highest;
    vn sum = {0}, top = {0};
    for (int i = 0; i < tile->count * SUBTILE; i += VECN_FLOATS) {
        const vn weight = vn_exp2(vn_load(scores + i) - reference);
        const vn product = weight * vn_load(scales->v + i);
        sum += weight;
        top = vn_max(product, top);
        vn_store(scores + i, product);
    }
    vn_store(st->sums[r], vn_load(st->sums[r]) * *old + sum);
    return vn_reduce_max(top);
}
