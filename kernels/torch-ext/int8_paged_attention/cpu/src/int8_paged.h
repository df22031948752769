/* Paged int8 KV cache on the CPU: the structs that Python fills, and the kernels that each instruction set provides.
 *
 * Plain C11 with GNU vector types; no torch and no Python headers. Layout and arithmetic: ../../storage.py,
 * ../../conditioning.py and ../../reference.py, DESIGN.md sections 2 and 6. All offsets are 64 bit.
 */
#ifndef INT8_PAGED_H
#define INT8_PAGED_H

#include <stdint.h>

#define INT8_PAGED_EXPORT __attribute__((visibility("default")))

enum { MAX_DIM = 256, SUBTILE = 16, MAX_FIRST_TOKENS = 16 };
enum { DTYPE_FLOAT32, DTYPE_FLOAT16, DTYPE_BFLOAT16 };
enum { OK = 0, BAD_LENGTH = -1, BAD_BLOCK = -2, NO_MEMORY = -3, BAD_RANGE = -4, BAD_FIRST_TOKEN = -5 };

/* Blocks [first, first + num_blocks) of a layer. Tiles in `dot4` order; every field is 8 bytes wide, as in all structs
 * that Python fills. */
typedef struct {
    int8_t *k, *v;
    uint16_t *k_scales, *v_scales;
    int64_t first, num_blocks;
} Segment;

/* Constant for a layer. */
typedef struct {
    const float *key_center; /* [num_kv_heads, head_dim] or NULL */
    int64_t num_kv_heads, num_blocks, block_size, head_dim, v_head_dim;
    int64_t rotate, num_segments;
    Segment segments[]; /* at least one, in the order of their blocks */
} Layer;

typedef struct {
    const int32_t *ids; /* [batch, max_blocks] */
    int64_t stride, max_blocks;
    const int32_t *lengths; /* [batch] */
} Table;

/* Strides count elements; the last axis is contiguous. */
typedef struct {
    const void *k_new, *v_new;
    int64_t k_strides[3], v_strides[3];
    int64_t dtype, batch, tokens;
    Table table; /* lengths: before this call */
} AppendCall;

/* First tokens in full precision: ../../first_tokens.py. */
typedef struct {
    const void *k, *v; /* [rows, num_kv_heads, count, dim], contiguous; NULL: there are none */
    const int32_t *row, *first, *stop; /* [batch] */
    int64_t rows, count, dtype;
} FirstTokens;

typedef struct {
    void *out;
    const void *q;
    int64_t out_strides[3], q_strides[3];
    int64_t dtype, batch, num_q_heads, q_len;
    Table table;
    double scale;
    const int32_t *kv_start; /* [batch] or NULL */
    const uint8_t *key_mask; /* [batch, mask_columns] or NULL */
    int64_t mask_stride, mask_columns, mask_start;
    int64_t window;      /* 0: none */
    double softcap;      /* 0: none */
    const float *sink_logits;  /* [num_q_heads] or NULL */
    FirstTokens first_tokens;
} DecodeCall;

/* Attention over a past in blocks and over the rows' own keys and values: table.lengths are those before the rows, and
 * row i stands at position length + i. */
typedef struct {
    DecodeCall rows;
    const void *k_new, *v_new; /* [batch, num_kv_heads, q_len, dim], of the dtype of q; the last axis contiguous */
    int64_t k_strides[3], v_strides[3];
} ExtendCall;

typedef struct {
    void *k_out, *v_out; /* [batch, num_kv_heads, stop - start, dim], contiguous */
    int64_t dtype, batch, start, stop;
    Table table;
} GatherCall;

/* One decode call, cut into work items (sequence, kv head, row block, split of the context). */
typedef struct {
    const Layer *layer;
    const DecodeCall *call;
    int64_t group, rows, row_blocks, splits, split_tokens;
    float *partials; /* [sequence, kv head, row block][split][partial_rows][partial_floats], NULL if splits == 1 */
    int64_t partial_rows, partial_floats;
    int32_t *pending; /* splits that have not finished, per [sequence, kv head, row block] */
} DecodePlan;

/* One extend call, cut into work items (sequence, kv head, tile of query rows). Row number i * group + g of a key/value
 * head is row i of its g-th query head, so that a tile's rows stand at few positions. */
typedef struct {
    const Layer *layer;
    const ExtendCall *call;
    int64_t group, rows, tile_rows, row_tiles;
} ExtendPlan;

enum { ROW_BLOCK = 32 }; /* query rows per work item */
enum { EXTEND_ROWS = 64 }; /* most query rows per work item of an extend call */
enum { PARTIAL_HEAD = 2 }; /* floats in front of a partial output row: maximum and sum of its softmax */

typedef struct {
    const char *name;
    int (*supported)(void);
    void (*append_rows)(const Layer *, const AppendCall *, int64_t begin, int64_t end);
    void (*decode_item)(const DecodePlan *, int64_t item);
    void (*extend_item)(const ExtendPlan *, int64_t item);
    void (*gather_blocks)(const Layer *, const GatherCall *, int64_t begin, int64_t end);
    void (*hadamard_rows)(float *out, const float *x, int64_t rows, int64_t dim);
} Kernels;

extern const Kernels int8_paged_portable;
#if defined(__x86_64__)
extern const Kernels int8_paged_avx512vnni, int8_paged_avxvnni, int8_paged_avx2;
#elif defined(__aarch64__)
extern const Kernels int8_paged_neon;
#endif

static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The segment of a block that the layer has; `likely` is any of the layer's, and looked at first. Later segments are
 * larger, so the search begins with the last one. */
static inline const Segment *segment_of(const Layer *layer, const Segment *likely, int64_t block)
{
    if ((uint64_t)(block - likely->first) < (uint64_t)likely->num_blocks) return likely;
    const Segment *segment = layer->segments + layer->num_segments - 1;
    while (block < segment->first) segment--;
    return segment;
}

/* Number of the first slot of a head's block in its segment. */
static inline int64_t slots_before(const Layer *layer, const Segment *segment, int64_t head, int64_t block)
{
    return (head * segment->num_blocks + block - segment->first) * layer->block_size;
}

/* First position that is read from the blocks, as far as the call says so for all rows. */
static inline int64_t first_in_blocks(const DecodeCall *call, int64_t sequence)
{
    int64_t first = call->kv_start ? max_i64(call->kv_start[sequence], 0) : 0;
    return call->first_tokens.k ? max_i64(first, call->first_tokens.stop[sequence]) : first;
}

/* Tokens [*begin, *end) that some query row of a sequence, the first of them at `position`, sees in the blocks, before
 * key_mask; both are 0 if there are none. Every block that holds one of them is inside the table, as no length is longer
 * than it. */
static inline void visible_range(const DecodeCall *call, int64_t sequence, int64_t position, int64_t *begin, int64_t *end)
{
    const int64_t length = call->table.lengths[sequence];
    int64_t first = first_in_blocks(call, sequence);
    if (call->window) first = max_i64(first, position - call->window + 1);
    int64_t last = length;
    if (call->key_mask) {
        first = max_i64(first, call->mask_start);
        last = min_i64(last, call->mask_start + call->mask_columns);
    }
    const int seen = first < last;
    *begin = seen ? first - first % SUBTILE : 0;
    *end = seen ? last : 0;
}

#endif
