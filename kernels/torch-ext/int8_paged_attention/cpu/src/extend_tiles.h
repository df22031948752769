/* Tiles of keys and values as floats, for all query rows of a work item: dequantized from the blocks, or loaded from
 * rows in full precision. Keys lie transposed, so that both products read their second factor row by row. */
#include "extend_products.h"

typedef struct {
    _Alignas(64) float keys[MAX_DIM * TILE_TOKENS]; /* [head_dim][TILE_TOKENS]; stored ones without their scales */
    _Alignas(64) float values[TILE_TOKENS * MAX_DIM]; /* [TILE_TOKENS][padded(v_head_dim)], likewise */
    vf k_scales[TILE_SUBTILES], v_scales[TILE_SUBTILES]; /* 0 where a token is faulty or not there */
    int64_t position[TILE_SUBTILES];
    uint32_t admitted[TILE_SUBTILES]; /* tokens that are there, and that the mask shows */
    uint32_t faulty[TILE_SUBTILES];   /* tokens whose key or value held NaN or infinity */
    int count;                        /* subtiles */
} FloatTile;

/* Sixteen groups of four bytes: element i of every group, as floats, to dst + i * stride. */
INLINE void unpack_groups(float *dst, int64_t stride, vm groups)
{
    vf_store(dst, __builtin_convertvector(groups << 24 >> 24, vf));
    vf_store(dst + stride, __builtin_convertvector(groups << 16 >> 24, vf));
    vf_store(dst + 2 * stride, __builtin_convertvector(groups << 8 >> 24, vf));
    vf_store(dst + 3 * stride, __builtin_convertvector(groups >> 24, vf));
}

/* The integers of stored keys and values as floats; their scales are left to scores and weights. Tokens that no row may
 * see have a scale of 0, as what stands there may be anything. */
static void dequantize_tile(FloatTile *dst, const Tile *src, const Layer *layer, int64_t first, int64_t last)
{
    const int64_t v_dim = layer->v_head_dim, v_stride = padded(v_dim), step_bytes = layer->block_size * 4;
    dst->count = src->count;
    for (int s = 0; s < src->count; s++) {
        vm groups = {0};
        for (int64_t d = 0; d < layer->head_dim; d += 4) {
            memcpy(&groups, src->k[s] + d / 4 * step_bytes, sizeof groups);
            unpack_groups(dst->keys + d * TILE_TOKENS + s * SUBTILE, TILE_TOKENS, groups);
        }
        for (int64_t t = 0; t < SUBTILE; t += 4) {
            const int8_t *v = src->v[s] + t * v_dim;
            float *out = dst->values + (s * SUBTILE + t) * v_stride;
            int64_t d = 0;
            for (; d + 16 <= v_dim; d += 16) {
                memcpy(&groups, v + d * 4, sizeof groups);
                unpack_groups(out + d, v_stride, groups);
            }
            if (d < v_dim) {
                groups = (vm){0};
                memcpy(&groups, v + d * 4, (size_t)(v_dim - d) * 4);
                unpack_groups(out + d, v_stride, groups);
            }
        }
        const vf k = vf_load_half(src->k_scales[s]), v = vf_load_half(src->v_scales[s]);
        const vm seen = vm_from_bits(src->admitted[s] & token_range(first, last, src->position[s]));
        const vm faulty = (k != k) | (v != v);
        dst->k_scales[s] = (vf)((vm)k & seen & ~faulty);
        dst->v_scales[s] = (vf)((vm)v & seen & ~faulty);
        dst->position[s] = src->position[s];
        dst->admitted[s] = src->admitted[s];
        dst->faulty[s] = vm_to_bits(faulty);
    }
}

/* Of every square of 2 * distance vectors and lanes, the two quarters beside the diagonal change places. */
INLINE void transpose_step(vf *x, const int distance)
{
    const vm lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vm upper = (lane & distance) != 0;
    UNROLL for (int pair = 0; pair < 8; pair++) {
        const int i = pair / distance * 2 * distance + pair % distance;
        const vf a = x[i], b = x[i + distance];
        x[i] = vf_select(upper, vf_swap(b, distance), a);
        x[i + distance] = vf_select(upper, b, vf_swap(a, distance));
    }
}

/* x[i][j] <-> x[j][i] of 16 vectors. */
INLINE void transpose16(vf *x)
{
    transpose_step(x, 1);
    transpose_step(x, 2);
    transpose_step(x, 4);
    transpose_step(x, 8);
}

/* Rows in full precision of some head: keys and values, and how far one token's are from the next one's, in elements. */
typedef struct {
    const char *k, *v;
    int64_t k_stride, v_stride, dtype;
    const float *center; /* taken from the keys, or NULL */
} DenseRows;

/* Tokens [from, from + count) of `rows` become subtile s, whose first token stands at `position`. */
static void load_dense_subtile(FloatTile *dst, int s, const DenseRows *rows, int64_t from, int count, const Layer *layer)
{
    const int64_t dim = layer->head_dim, v_stride = padded(layer->v_head_dim), bytes = dtype_bytes(rows->dtype);
    _Alignas(64) float k[SUBTILE][MAX_DIM];
    dst->faulty[s] = 0;
    for (int t = 0; t < SUBTILE; t++) {
        float *v = dst->values + (s * SUBTILE + t) * v_stride;
        int finite_key = 0, finite_value = 0;
        if (t < count) {
            load_row(k[t], rows->k + (from + t) * rows->k_stride * bytes, rows->dtype, dim);
            load_row(v, rows->v + (from + t) * rows->v_stride * bytes, rows->dtype, layer->v_head_dim);
            largest_magnitude(k[t], dim, &finite_key);
            largest_magnitude(v, layer->v_head_dim, &finite_value);
            if (!finite_key || !finite_value) dst->faulty[s] |= 1u << t;
        }
        if (!finite_key) memset(k[t], 0, (size_t)padded(dim) * sizeof(float));
        if (!finite_value) memset(v, 0, (size_t)v_stride * sizeof(float));
        if (finite_key && rows->center)
            for (int64_t d = 0; d < dim; d++) k[t][d] -= rows->center[d];
    }
    for (int64_t d = 0; d < dim; d += 16) {
        vf x[16];
        UNROLL for (int t = 0; t < SUBTILE; t++) x[t] = vf_load(k[t] + d);
        transpose16(x);
        UNROLL for (int i = 0; i < 16; i++) vf_store(dst->keys + (d + i) * TILE_TOKENS + s * SUBTILE, x[i]);
    }
    dst->k_scales[s] = dst->v_scales[s] = vf_set1(1);
}
