/* A step of a decoder at work; the parts of decoder.c. */
#ifndef BW_DECODER_H
#define BW_DECODER_H

#include <stdatomic.h>

#include "choose.h"
#include "few.h"
#include "phases.h"

/* The loops of a block, in their order: with an MLP the first five; with experts the last three for the last two. */
typedef enum {
    BW_LOOP_QKV,
    BW_LOOP_ATTENTION,
    BW_LOOP_O,
    BW_LOOP_MLP,
    BW_LOOP_DOWN,
    BW_LOOP_ROUTER,
    BW_LOOP_EXPERTS,
    BW_LOOP_EXPERTS_DOWN
} bw_loop_kind;

typedef struct {
    const bw_decoder_block *block;
    bw_loop_kind kind;
} bw_loop;

enum { BW_MOST_PARTS = 3 };

/* A part of a layer at work on some rows: prepared tokens, and where its results go, one row after the other. */
typedef struct {
    const bw_part *part;
    ptrdiff_t tokens;
    float *out; /* (tokens, out_stride) */
    ptrdiff_t out_stride;
    int paired; /* it is a gate, and the next one its `up`: the product of both with the activation is kept */
    int pairs;  /* its rows are a gate's and an up's in turns, of which the same is kept */
    const float *x;
    const ptrdiff_t *rows;
    bw_layout layout;
    bw_trellis_layout trellis_layout;
    bw_few few;
    bw_trellis_few trellis;
} bw_work;

/* Which experts the tokens of a step chose. A slot is a token's place with one of its experts, in the experts' order.
 */
typedef struct {
    float *logits, *shared;         /* of the router (tokens, width); of the shared expert's gate (tokens, BW_UNIT) */
    float *weights;                 /* (tokens, chosen), like the next two */
    int64_t *experts;               /* best first */
    ptrdiff_t *slots;               /* where the results of each lie */
    ptrdiff_t *tokens;              /* of each slot */
    ptrdiff_t *firsts;              /* (experts + 1): the first slot of each expert */
    const int64_t *given;           /* experts of the next block, where a step names them; or NULL */
    float *outs;                    /* (slots, then tokens of the block's own MLP; hidden) */
    ptrdiff_t width, most, most_of; /* width: logits, padded; most experts that a token chooses, and of how many */
} bw_choice;

typedef struct {
    const bw_decoder *decoder;
    const bw_step *step;
    ptrdiff_t tokens, hidden, inner, q_width, kv_width, dim; /* widths padded to whole units, dim to whole vectors */
    float *h, *x, *y, *q, *k, *v, *queries, *mixed, *middle; /* (tokens, width); middle: (slots and tokens, inner) */
    float *keys, *gain;                                      /* of one token, of one norm */
    bw_choice choice;
    char *prepared; /* room for every token of every work */
    ptrdiff_t prepared_bytes, used_bytes;
    bw_work *works;
    int n_works, activated; /* activated: results pass the activation */
    ptrdiff_t rows_per_chunk, heads_per_chunk;
    char *scratch;
    ptrdiff_t scratch_bytes, score_stride; /* of one worker */
    int n_workers;
    bw_loop *loops;
    bw_phase *phases;
    atomic_int status;
} bw_decoding;

static inline ptrdiff_t bw_whole_units(ptrdiff_t n) {
    return (n + BW_UNIT - 1) / BW_UNIT * BW_UNIT;
}

/* ---- decoder_check.c ---- */
/* The most that any part of a decoder wants: scratch of a worker, bytes of a prepared token, columns inside an MLP;
 * experts. */
typedef struct {
    ptrdiff_t scratch, token, inner, chosen, experts, n_phases;
} bw_needs;

bw_status bw_check_step(const bw_decoder *decoder, const bw_step *step, bw_needs *all);

/* ---- decoder_linear.c ---- */
/* Bytes that a layer wants: scratch of a worker, and one prepared token. BW_ERR_* when it is not legal. */
bw_status bw_linear_needs(const bw_linear *linear, ptrdiff_t *scratch, ptrdiff_t *token);
/* Makes a part ready that reads `tokens` rows of x, those numbered by `rows`, or the first ones for NULL. */
bw_work *bw_add_work(bw_decoding *d, const bw_part *part, const float *x, ptrdiff_t x_stride, const ptrdiff_t *rows,
                     ptrdiff_t tokens, float *out, ptrdiff_t out_stride);
/* The first half of an MLP: gate and up, or up alone, whose rows may be both in turns. */
void bw_add_mlp(bw_decoding *d, const bw_mlp *mlp, int pairs, const ptrdiff_t *rows, ptrdiff_t tokens, float *middle);
/* Its second half, which reads what the first one wrote. */
void bw_add_down(bw_decoding *d, const bw_mlp *mlp, ptrdiff_t tokens, float *middle, float *out);
/* Of all the works that were added: how many chunks they are. */
ptrdiff_t bw_begin_works(bw_decoding *d);
void bw_linear_chunk(bw_decoding *d, ptrdiff_t chunk, int worker);

/* ---- decoder_experts.c ---- */
void bw_add_router(bw_decoding *d, const bw_decoder_block *block);
void bw_add_experts(bw_decoding *d, const bw_decoder_block *block);
void bw_add_experts_down(bw_decoding *d, const bw_decoder_block *block);
/* y = what the experts and the block's own MLP say together. */
void bw_mix_experts(bw_decoding *d, const bw_decoder_block *block);

/* ---- decoder_attention.c ---- */
/* Norms, rotation, and the new keys and values to their room; returns the chunks. */
ptrdiff_t bw_begin_attention(bw_decoding *d, const bw_decoder_block *block);
void bw_attention_chunk(bw_decoding *d, const bw_decoder_block *block, ptrdiff_t chunk, int worker);
/* One norm of one row of n numbers, in place or not. */
void bw_apply_norm(bw_decoding *d, const bw_norm *norm, const float *x, ptrdiff_t n, float *out);

#endif
