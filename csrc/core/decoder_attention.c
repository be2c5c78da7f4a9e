/* Attention of a decoder's step: new keys and values go to their room, and what is read, is read from there. */
#include <string.h>

#include "cpu.h"
#include "decoder.h"
#include "matmul.h"

enum { CHUNKS = 2 /* for each thread, at least */ };

static ptrdiff_t value_bytes(const bw_decoding *d) {
    return d->decoder->dtype == BW_F32 ? 4 : 2;
}

void bw_apply_norm(bw_decoding *d, const bw_norm *norm, const float *x, ptrdiff_t n, float *out) {
    ptrdiff_t padded = (n + 15) / 16 * 16;
    if (norm->kind != BW_GAIN_NONE) {
        bw_cpu()->load_row(&norm->gain, 0, 0, n, d->gain);
        memset(d->gain + n, 0, (size_t)(padded - n) * 4);
    }
    bw_cpu()->norm_row(x, n, d->gain, norm->eps, norm->kind, d->decoder->dtype, out);
}

/* Where the keys (which 0) or values (1) of a sequence and a head begin. */
static char *room_of(const bw_decoding *d, const bw_decoder_block *block, int which, ptrdiff_t sequence,
                     ptrdiff_t head) {
    const bw_room *room = &d->step->rooms[block->room];
    const bw_decoder *m = d->decoder;
    ptrdiff_t at = ((block->place * 2 + which) * d->step->batch + sequence) * m->kv_heads + head;
    return room->data + at * room->capacity * m->dim * value_bytes(d);
}

/* Heads of one token, from `rows` to padded heads at `out`: normed and rotated. */
static void turn_heads(bw_decoding *d, const bw_decoder_block *block, ptrdiff_t token, float *rows, ptrdiff_t heads,
                       const bw_norm *norm, float *out) {
    const bw_decoder *m = d->decoder;
    if (norm->present && !m->norm_by_head) bw_apply_norm(d, norm, rows, heads * m->dim, rows);
    for (ptrdiff_t h = 0; h < heads; h++, out += d->dim) {
        memcpy(out, rows + h * m->dim, (size_t)m->dim * 4);
        if (norm->present && m->norm_by_head) bw_apply_norm(d, norm, out, m->dim, out);
        if (block->rope < 0) continue;
        const bw_rope *rope = &d->step->ropes[block->rope];
        bw_cpu()->rotate_row(out, rope->n, rope->cosine + token * rope->n, rope->sine + token * rope->n, rope->steps,
                             m->dtype);
    }
}

/* Keys or values of one token to their rows. */
static void keep(const bw_decoding *d, const bw_decoder_block *block, int which, ptrdiff_t token, const float *rows,
                 ptrdiff_t stride) {
    const bw_decoder *m = d->decoder;
    ptrdiff_t sequence = token / d->step->n_new, row = d->step->rooms[block->room].end + token % d->step->n_new;
    for (ptrdiff_t h = 0; h < m->kv_heads; h++)
        bw_cpu()->store(rows + h * stride, m->dim, m->dtype,
                        room_of(d, block, which, sequence, h) + row * m->dim * value_bytes(d));
}

ptrdiff_t bw_begin_attention(bw_decoding *d, const bw_decoder_block *block) {
    const bw_decoder *m = d->decoder;
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        turn_heads(d, block, t, d->q + t * d->q_width, m->heads, &block->q_norm, d->queries + t * m->heads * d->dim);
        turn_heads(d, block, t, d->k + t * d->kv_width, m->kv_heads, &block->k_norm, d->keys);
        keep(d, block, 0, t, d->keys, d->dim);
        keep(d, block, 1, t, d->v + t * d->kv_width, m->dim);
    }
    /* Heads that share keys stay together where there are chunks enough without parting them. */
    ptrdiff_t group = m->heads / m->kv_heads, shared = d->step->batch * m->kv_heads;
    ptrdiff_t pieces = (CHUNKS * d->n_workers + shared - 1) / shared;
    d->heads_per_chunk = pieces > group ? 1 : (group + pieces - 1) / pieces;
    if (shared % d->n_workers && shared < 8 * d->n_workers) d->heads_per_chunk = 1; /* else some thread has one more */
    return shared * ((group - 1) / d->heads_per_chunk + 1);
}

static void attend(bw_decoding *d, const bw_decoder_block *block, ptrdiff_t token, ptrdiff_t kv_head, ptrdiff_t head,
                   ptrdiff_t n_heads, float *scores, float *totals) {
    const bw_decoder *m = d->decoder;
    const bw_room *room = &d->step->rooms[block->room];
    ptrdiff_t sequence = token / d->step->n_new, own = room->end + token % d->step->n_new; /* its own row */
    ptrdiff_t before = room->seen - room->end;                                             /* of row 0 in the text */
    ptrdiff_t first = room->start;
    int64_t padding = d->step->padding ? d->step->padding[sequence] : 0; /* any number: INT64_MIN too */
    if (padding > before && padding - before > first) first = (ptrdiff_t)(padding - before);
    if (block->window && own - block->window + 1 > first) first = own - block->window + 1;
    if (first > own) first = own; /* nothing but padding: what comes out is not looked at */
    ptrdiff_t n = own - first + 1, offset = first * m->dim * value_bytes(d);
    bw_attend job = {.dim = m->dim,
                     .query_stride = d->dim,
                     .out_stride = m->dim,
                     .stride = d->score_stride,
                     .n_heads = (int)n_heads,
                     .scale = m->attention_scale,
                     .dtype = m->dtype};
    float *mixed = d->mixed + token * d->q_width + head * m->dim;
    bw_cpu()->attend_scores(&job, d->queries + (token * m->heads + head) * d->dim,
                            room_of(d, block, 0, sequence, kv_head) + offset, n, scores);
    for (ptrdiff_t h = 0; h < n_heads; h++) {
        float *own_scores = scores + h * d->score_stride;
        if (block->sinks.data) bw_cpu()->load_row(&block->sinks, 0, head + h, 1, own_scores + n);
        totals[h] = bw_cpu()->attend_weights(own_scores, n + (block->sinks.data != NULL), m->attention_cap);
    }
    bw_cpu()->attend_mix(&job, scores, totals, room_of(d, block, 1, sequence, kv_head) + offset, n, mixed);
}

void bw_attention_chunk(bw_decoding *d, const bw_decoder_block *block, ptrdiff_t chunk, int worker) {
    const bw_decoder *m = d->decoder;
    ptrdiff_t group = m->heads / m->kv_heads, pieces = (group - 1) / d->heads_per_chunk + 1;
    ptrdiff_t kv_head = chunk / pieces % m->kv_heads, sequence = chunk / pieces / m->kv_heads,
              first = chunk % pieces * d->heads_per_chunk, n = bw_least(d->heads_per_chunk, group - first);
    float *totals = (float *)(d->scratch + worker * d->scratch_bytes), *scores = totals + bw_whole_units(group);
    for (ptrdiff_t i = 0; i < d->step->n_new; i++)
        attend(d, block, sequence * d->step->n_new + i, kv_head, kv_head * group + first, n, scores, totals);
}
