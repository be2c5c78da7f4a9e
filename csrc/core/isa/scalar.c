/* Portable set: 16 lanes as an array. The reference that the others are compared with. */
#include <math.h>
#include <string.h>

#include "../codec/trellis.h"
#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"
#include "bits.h"

typedef struct {
    float v[16];
} bw_vf;

#define EACH(expression)                                \
    bw_vf r;                                            \
    for (int i = 0; i < 16; i++) r.v[i] = (expression); \
    return r

static inline bw_vf bw_load(const float *p) {
    bw_vf r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline void bw_store(float *p, bw_vf a) {
    memcpy(p, a.v, sizeof a.v);
}
static inline uint16_t half_at(const void *p, int i) {
    uint16_t h;
    memcpy(&h, (const char *)p + 2 * i, 2);
    return h;
}
static inline bw_vf bw_load_f16(const void *p) {
    EACH(bw_from_f16(half_at(p, i)));
}
static inline bw_vf bw_load_bf16(const void *p) {
    EACH(bw_from_bf16(half_at(p, i)));
}
static inline bw_vf bw_load_u8(const uint8_t *p) {
    EACH((float)p[i]);
}
static inline void bw_store_f16(void *p, bw_vf a) {
    uint16_t h[16];
    for (int i = 0; i < 16; i++) h[i] = bw_to_f16(a.v[i]);
    memcpy(p, h, sizeof h);
}
static inline void bw_store_bf16(void *p, bw_vf a) {
    uint16_t h[16];
    for (int i = 0; i < 16; i++) h[i] = bw_to_bf16(a.v[i]);
    memcpy(p, h, sizeof h);
}
/* Rounds to nearest, ties to even. */
static inline void bw_store_u8(uint8_t *p, bw_vf a) {
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)rintf(a.v[i]);
}
static inline bw_vf bw_set(float x) {
    EACH(x);
}
static inline bw_vf bw_add(bw_vf a, bw_vf b) {
    EACH(a.v[i] + b.v[i]);
}
static inline bw_vf bw_sub(bw_vf a, bw_vf b) {
    EACH(a.v[i] - b.v[i]);
}
static inline bw_vf bw_mul(bw_vf a, bw_vf b) {
    EACH(a.v[i] * b.v[i]);
}
static inline bw_vf bw_div(bw_vf a, bw_vf b) {
    EACH(a.v[i] / b.v[i]);
}
static inline bw_vf bw_fma(bw_vf a, bw_vf b, bw_vf c) {
    EACH(fmaf(a.v[i], b.v[i], c.v[i]));
}
static inline bw_vf bw_min(bw_vf a, bw_vf b) {
    EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
static inline bw_vf bw_max(bw_vf a, bw_vf b) {
    EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
/* a < b ? x : y, lane by lane. */
static inline bw_vf bw_select_less(bw_vf a, bw_vf b, bw_vf x, bw_vf y) {
    EACH(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
static inline bw_vf bw_rint(bw_vf a) {
    EACH(rintf(a.v[i]));
}
/* 2^n for whole n in -127 .. 127 (2^-127 gives 0); anything for other n. */
static inline bw_vf bw_pow2(bw_vf n) {
    EACH(n.v[i] > -127 && n.v[i] < 128 ? bw_float_of_bits((uint32_t)((int32_t)n.v[i] + 127) << 23) : 0);
}

/* Folds halves: lane i + lane i+8, then +4, +2, +1. The order that every set keeps. */
static inline float bw_sum(bw_vf a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
    return a.v[0];
}
static inline float bw_reduce_min(bw_vf a) {
    float r = a.v[0];
    for (int i = 1; i < 16; i++) r = a.v[i] < r ? a.v[i] : r;
    return r;
}
static inline float bw_reduce_max(bw_vf a) {
    float r = a.v[0];
    for (int i = 1; i < 16; i++) r = a.v[i] > r ? a.v[i] : r;
    return r;
}

#include "units.h"
#include "paths.h"
#include "eights.h"
#include "../kernels/all.h"

static int supported(void) {
    return 1;
}

const bw_isa bw_isa_scalar = BW_TABLE("scalar", 0, supported);
