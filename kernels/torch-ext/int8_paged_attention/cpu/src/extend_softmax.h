/* The online softmax of a tile of query rows over a tile of keys: products -> scores -> weights times V scales. What all
 * tiles pass is written for one register at a time, as compilers cut a vf of several registers through memory. */
#include "extend_tiles.h"

typedef struct {
    FloatTile tile;
    _Alignas(64) float q[EXTEND_ROWS * MAX_DIM];         /* [rows][padded(head_dim)] */
    _Alignas(64) float out[EXTEND_ROWS * MAX_DIM];       /* [rows][padded(v_head_dim)], sum of weight * value so far */
    _Alignas(64) float scores[EXTEND_ROWS][TILE_TOKENS]; /* and weights after them */
    _Alignas(64) float sums[EXTEND_ROWS][FLOAT_LANES];   /* of weights, lane by lane */
    _Alignas(64) float highest[EXTEND_ROWS];             /* score so far, in units of log2 */
    _Alignas(64) float largest[EXTEND_ROWS];             /* score in the tile at hand */
    _Alignas(64) float reference[EXTEND_ROWS];           /* score whose weight is 1 */
    _Alignas(64) float old[EXTEND_ROWS];                 /* factor on what was summed before the tile at hand */
    float center_score[EXTEND_ROWS];                     /* what key centring took from every score */
    int64_t first[EXTEND_ROWS], last[EXTEND_ROWS];       /* the row sees tokens [first, last) of the current part */
    uint8_t faulty_query[EXTEND_ROWS], fault[EXTEND_ROWS];
    const ExtendPlan *plan;
    int64_t sequence, head, row; /* of the first row */
    int rows, any_faulty_query, capped;
    int64_t latest_first, earliest_last; /* all rows see what lies between */
    int64_t earliest_first, latest_last; /* no row sees what lies outside */
    float factor, softcap;
} ExtendState;

/* vf_exp2 of one register. */
INLINE Floats floats_exp2(Floats x)
{
    typedef int32_t Bits __attribute__((vector_size(sizeof(Floats))));
    const Floats magic = floats_set1(12582912.0f); /* 1.5 * 2^23 */
    x = floats_max(x, floats_set1(-127.0f));
    const Floats shifted = x + magic, r = x - (shifted - magic);
    Floats y = floats_set1(1.535336188319500e-4f);
    y = floats_mul_add(y, r, floats_set1(1.339887440266574e-3f));
    y = floats_mul_add(y, r, floats_set1(9.618437357674640e-3f));
    y = floats_mul_add(y, r, floats_set1(5.550332471162809e-2f));
    y = floats_mul_add(y, r, floats_set1(2.402264791363012e-1f));
    y = floats_mul_add(y, r, floats_set1(6.931472028550421e-1f));
    y = floats_mul_add(y, r, floats_set1(1.0f));
    return y * (Floats)(((Bits)shifted - 0x4b400000 + 127) << 23);
}

INLINE float floats_largest(Floats x)
{
    float lanes[FLOAT_LANES];
    floats_store(lanes, x);
    for (int width = FLOAT_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = larger(lanes[i], lanes[i + width]);
    return lanes[0];
}

/* Scores of a row that sees all tokens of the tile, none of which is faulty, uncapped. Returns the largest. */
INLINE float plain_scores(ExtendState *st, int r, int64_t tokens)
{
    const float *scales = (const float *)st->tile.k_scales;
    float *scores = st->scores[r];
    const Floats f = floats_set1(st->factor), c = floats_set1(st->center_score[r]);
    Floats largest = floats_set1(-INFINITY);
    for (int64_t t = 0; t < tokens; t += FLOAT_LANES) {
        const Floats x = floats_mul_add(floats_load(scores + t) * floats_load(scales + t), f, c);
        floats_store(scores + t, x);
        largest = floats_max(x, largest);
    }
    return floats_largest(largest);
}

/* Scores of a row where a token is hidden or faulty, or scores are capped. Returns the largest. */
static float hidden_scores(ExtendState *st, int r)
{
    const FloatTile *tile = &st->tile;
    float *scores = st->scores[r];
    vf largest = vf_set1(-INFINITY);
    for (int s = 0; s < tile->count; s++) {
        const uint32_t seen = token_range(st->first[r], st->last[r], tile->position[s]) & tile->admitted[s];
        st->fault[r] |= (seen & tile->faulty[s]) || (seen && st->faulty_query[r]);
        vf x = vf_load(scores + s * SUBTILE) * tile->k_scales[s] * st->factor + st->center_score[r];
        if (st->capped) x = vf_tanh(x / st->softcap) * (st->softcap * LOG2_E);
        x = vf_select(vm_from_bits(seen & ~tile->faulty[s]), x, vf_set1(-INFINITY));
        vf_store(scores + s * SUBTILE, x);
        largest = vf_max(x, largest);
    }
    return vf_reduce_max(largest);
}

/* Scores of a row -> weights times V scales, with `reference` and `old` as they are now. */
INLINE void weigh_tokens(ExtendState *st, int r, int64_t tokens)
{
    const float *scales = (const float *)st->tile.v_scales;
    float *scores = st->scores[r];
    const Floats reference = floats_set1(st->reference[r]);
    Floats sum = floats_load(st->sums[r]) * floats_set1(st->old[r]);
    for (int64_t t = 0; t < tokens; t += FLOAT_LANES) {
        const Floats weight = floats_exp2(floats_load(scores + t) - reference);
        sum += weight;
        floats_store(scores + t, weight * floats_load(scales + t));
    }
    floats_store(st->sums[r], sum);
}

static void softmax_rows(ExtendState *st, int plain)
{
    const int64_t tokens = st->tile.count * SUBTILE;
    for (int r = 0; r < st->rows; r++) st->largest[r] = plain ? plain_scores(st, r, tokens) : hidden_scores(st, r);
    for (int r = 0; r < st->rows; r += FLOAT_LANES) { /* past the last row there is room */
        typedef int32_t Bits __attribute__((vector_size(sizeof(Floats))));
        const Floats before = floats_load(st->highest + r), highest = floats_max(floats_load(st->largest + r), before);
        const Bits some = (Bits)(highest != floats_set1(-INFINITY));
        const Floats reference = (Floats)((Bits)highest & some);
        floats_store(st->highest + r, highest);
        floats_store(st->reference + r, reference);
        floats_store(st->old + r, floats_exp2(before - reference));
    }
    for (int r = 0; r < st->rows; r++) weigh_tokens(st, r, tokens);
}
