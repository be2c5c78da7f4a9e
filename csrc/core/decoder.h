/* A step of a decoder at work; the parts of decoder.c. */
#ifndef BW_DECODER_H
#define BW_DECODER_H

#include <stdatomic.h>

#include "few.h"
#include "phases.h"

/* The loops of a block, in their order. */
enum { BW_LOOP_QKV, BW_LOOP_ATTENTION, BW_LOOP_O, BW_LOOP_MLP, BW_LOOP_DOWN, BW_LOOPS };

enum { BW_MOST_PARTS = 3 };

/* A part of a layer at work: prepared tokens, and where its results go. */
typedef struct {
    const bw_part *part;
    bw_layout layout;
    bw_trellis_layout trellis_layout;
    bw_few few;
    bw_trellis_few trellis;
    float *out; /* (tokens, out_stride) */
    ptrdiff_t out_stride;
} bw_work;

typedef struct {
    const bw_decoder *decoder;
    const bw_step *step;
    ptrdiff_t tokens, hidden, inner, q_width, kv_width, dim; /* widths padded to whole units, dim to whole vectors */
    float *h, *x, *y, *q, *k, *v, *queries, *mixed, *middle; /* (tokens, width) */
    float *keys, *gain;                                      /* of one token, of one norm */
    char *prepared;                                          /* room for BW_MOST_PARTS times the tokens */
    ptrdiff_t prepared_bytes;
    bw_work works[BW_MOST_PARTS];
    int n_works, gated;
    ptrdiff_t rows_per_chunk, heads_per_chunk;
    char *scratch;
    ptrdiff_t scratch_bytes, score_stride; /* of one worker */
    int n_workers;
    bw_phase *phases;
    atomic_int status;
} bw_decoding;

static inline ptrdiff_t bw_whole_units(ptrdiff_t n) {
    return (n + BW_UNIT - 1) / BW_UNIT * BW_UNIT;
}

/* ---- decoder_linear.c ---- */
/* Bytes that a layer wants: scratch of a worker, and one prepared token. BW_ERR_* when it is not legal. */
bw_status bw_linear_needs(const bw_linear *linear, ptrdiff_t *scratch, ptrdiff_t *token);
/* Makes n parts ready that read the same rows x (tokens, stride); returns the chunks. gated: two parts, gate and up,
 * whose product with the activation is what is kept, in the first one's place. */
ptrdiff_t bw_begin_linear(bw_decoding *d, const bw_part *const *parts, float *const *outs, const ptrdiff_t *strides,
                          int n, int gated, const float *x, ptrdiff_t x_stride);
void bw_linear_chunk(bw_decoding *d, ptrdiff_t chunk, int worker);

/* ---- decoder_attention.c ---- */
/* Norms, rotation, and the new keys and values to their room; returns the chunks. */
ptrdiff_t bw_begin_attention(bw_decoding *d, const bw_decoder_block *block);
void bw_attention_chunk(bw_decoding *d, const bw_decoder_block *block, ptrdiff_t chunk, int worker);
/* One norm of one row of n numbers, in place or not. */
void bw_apply_norm(bw_decoding *d, const bw_norm *norm, const float *x, ptrdiff_t n, float *out);

#endif
