/* Experts of a decoder's step: each token's few, each expert's layers read once for all tokens that chose it. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "decoder.h"
#include "float16.h"

static float rounded(float x, bw_dtype dtype) {
    if (dtype == BW_F32) return x;
    return dtype == BW_F16 ? bw_from_f16(bw_to_f16(x)) : bw_from_bf16(bw_to_bf16(x));
}

/* values[i] = exp(values[i] - largest) / their sum */
static void softmax(float *values, ptrdiff_t n) {
    float top = values[0], sum = 0;
    for (ptrdiff_t i = 1; i < n; i++) top = values[i] > top ? values[i] : top;
    for (ptrdiff_t i = 0; i < n; i++) sum += values[i] = expf(values[i] - top);
    for (ptrdiff_t i = 0; i < n; i++) values[i] /= sum;
}

/* `given` experts, or for NULL those of the largest logits. */
static void route(const bw_routing *r, const float *logits, const int64_t *given, int64_t *experts, float *weights) {
    float values[BW_MOST_EXPERTS];
    bw_ranked ranked[BW_MOST_EXPERTS];
    memcpy(values, logits, (size_t)r->n * 4);
    if (r->over_all) softmax(values, r->n);
    for (ptrdiff_t i = 0; i < r->n; i++) ranked[i] = (bw_ranked){values[i], (int32_t)i};
    if (!given) bw_choose(ranked, r->n, r->chosen);
    float sum = 0;
    for (ptrdiff_t k = 0; k < r->chosen; k++) {
        experts[k] = given ? given[k] : ranked[k].index;
        sum += weights[k] = values[experts[k]];
    }
    if (!r->over_all) softmax(weights, r->chosen);
    for (ptrdiff_t k = 0; k < r->chosen; k++) {
        if (r->over_all && r->divided) weights[k] /= sum;
        weights[k] = rounded(weights[k], r->dtype);
    }
}

bw_status bw_route(const bw_routing *r, const float *logits, ptrdiff_t rows, int64_t *experts, float *weights) {
    if (r->n < 1 || r->n > BW_MOST_EXPERTS || r->chosen < 1 || r->chosen > BW_MOST_CHOSEN || r->chosen > r->n)
        return BW_ERR_ARGUMENT;
    if (r->dtype != BW_F32 && r->dtype != BW_F16 && r->dtype != BW_BF16) return BW_ERR_ARGUMENT;
    if (rows < 0 || (rows && (!logits || !experts || !weights))) return BW_ERR_ARGUMENT;
    for (ptrdiff_t i = 0; i < rows; i++, logits += r->n, experts += r->chosen, weights += r->chosen)
        route(r, logits, NULL, experts, weights);
    return BW_OK;
}

void bw_add_router(bw_decoding *d, const bw_decoder_block *block) {
    const bw_mixture *m = &block->mixture;
    bw_add_work(d, &m->router, d->x, d->hidden, NULL, d->tokens, d->choice.logits, d->choice.width);
    if (m->shared_gate.linear)
        bw_add_work(d, &m->shared_gate, d->x, d->hidden, NULL, d->tokens, d->choice.shared, BW_UNIT);
}

/* Slots by expert, and within an expert by token. */
static void give_slots(bw_choice *c, ptrdiff_t tokens, ptrdiff_t n, ptrdiff_t chosen) {
    memset(c->firsts, 0, (size_t)(n + 1) * sizeof *c->firsts);
    for (ptrdiff_t i = 0; i < tokens * chosen; i++) c->firsts[c->experts[i] + 1]++;
    for (ptrdiff_t e = 0; e < n; e++) c->firsts[e + 1] += c->firsts[e];
    for (ptrdiff_t i = 0; i < tokens * chosen; i++) {
        ptrdiff_t slot = c->firsts[c->experts[i]]++;
        c->slots[i] = slot;
        c->tokens[slot] = i / chosen;
    }
    memmove(c->firsts + 1, c->firsts, (size_t)n * sizeof *c->firsts); /* each had moved on to the next one's first */
    c->firsts[0] = 0;
}

void bw_add_experts(bw_decoding *d, const bw_decoder_block *block) {
    const bw_routing *r = &block->mixture.routing;
    bw_choice *c = &d->choice;
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        route(r, c->logits + t * c->width, c->given, c->experts + t * r->chosen, c->weights + t * r->chosen);
        if (c->given) c->given += r->chosen;
    }
    give_slots(c, d->tokens, r->n, r->chosen);
    for (ptrdiff_t e = 0; e < r->n; e++) {
        ptrdiff_t first = c->firsts[e], n = c->firsts[e + 1] - first;
        const ptrdiff_t *rows = d->tokens == 1 ? NULL : c->tokens + first; /* one token is prepared once for all */
        if (n) bw_add_mlp(d, block->mixture.experts + e, block->mixture.pairs, rows, n, d->middle + first * d->inner);
    }
    if (block->mlp.up.linear)
        bw_add_mlp(d, &block->mlp, 0, NULL, d->tokens, d->middle + d->tokens * r->chosen * d->inner);
}

void bw_add_experts_down(bw_decoding *d, const bw_decoder_block *block) {
    const bw_routing *r = &block->mixture.routing;
    bw_choice *c = &d->choice;
    for (ptrdiff_t e = 0; e < r->n; e++) {
        ptrdiff_t first = c->firsts[e], n = c->firsts[e + 1] - first;
        if (n) bw_add_down(d, block->mixture.experts + e, n, d->middle + first * d->inner, c->outs + first * d->hidden);
    }
    ptrdiff_t first = d->tokens * r->chosen;
    if (block->mlp.up.linear)
        bw_add_down(d, &block->mlp, d->tokens, d->middle + first * d->inner, c->outs + first * d->hidden);
}

void bw_mix_experts(bw_decoding *d, const bw_decoder_block *block) {
    const bw_routing *r = &block->mixture.routing;
    const bw_decoder *m = d->decoder;
    const bw_choice *c = &d->choice;
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        float *y = d->y + t * d->hidden;
        memset(y, 0, (size_t)d->hidden * 4);
        for (ptrdiff_t k = t * r->chosen; k < (t + 1) * r->chosen; k++)
            bw_cpu()->mix_row(y, c->outs + c->slots[k] * d->hidden, m->hidden, c->weights[k], r->dtype);
        bw_cpu()->round_row(y, m->hidden, m->dtype);
        if (!block->mlp.up.linear) continue;
        float gate = 1;
        if (block->mixture.shared_gate.linear) gate = rounded(1 / (1 + expf(-c->shared[t * BW_UNIT])), m->dtype);
        bw_cpu()->add_row(y, c->outs + (d->tokens * r->chosen + t) * d->hidden, m->hidden, gate, m->dtype);
    }
}
