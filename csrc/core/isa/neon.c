/* NEON of AArch64 (every 64-bit Arm): 16 lanes in four registers. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "../codec/trellis.h"
#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"
#include "bits.h"

typedef struct {
    float32x4_t q[4]; /* lanes 0..3, 4..7, 8..11, 12..15 */
} bw_vf;

#define EACH(expression)                               \
    bw_vf r;                                           \
    for (int i = 0; i < 4; i++) r.q[i] = (expression); \
    return r

static inline bw_vf bw_load(const float *p) {
    EACH(vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(p + 4 * i))));
}
static inline void bw_store(float *p, bw_vf x) {
    for (int i = 0; i < 4; i++) vst1q_u8((uint8_t *)(p + 4 * i), vreinterpretq_u8_f32(x.q[i]));
}
static inline uint16x4_t load_half(const void *p, int i) {
    return vreinterpret_u16_u8(vld1_u8((const uint8_t *)p + 8 * i));
}
static inline bw_vf bw_load_f16(const void *p) {
    EACH(vcvt_f32_f16(vreinterpret_f16_u16(load_half(p, i))));
}
static inline bw_vf bw_load_bf16(const void *p) {
    EACH(vreinterpretq_f32_u32(vshll_n_u16(load_half(p, i), 16)));
}
static inline bw_vf bw_load_u8(const uint8_t *p) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    uint32x4_t words[4] = {vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)),
                           vmovl_u16(vget_high_u16(high))};
    EACH(vcvtq_f32_u32(words[i]));
}
static inline void bw_store_f16(void *p, bw_vf x) {
    for (int i = 0; i < 4; i++) vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.q[i])));
}
/* Nearest, ties to even; NaN keeps its top bits and becomes quiet. */
static inline void bw_store_bf16(void *p, bw_vf x) {
    for (int i = 0; i < 4; i++) {
        uint32x4_t bits = vreinterpretq_u32_f32(x.q[i]);
        uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        rounded = vbslq_u32(vceqq_f32(x.q[i], x.q[i]), rounded, quiet);
        vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_u16(vshrn_n_u32(rounded, 16)));
    }
}
static inline void bw_store_u8(uint8_t *p, bw_vf x) {
    uint16x8_t low = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.q[0])), vmovn_u32(vcvtnq_u32_f32(x.q[1])));
    uint16x8_t high = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.q[2])), vmovn_u32(vcvtnq_u32_f32(x.q[3])));
    vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
static inline bw_vf bw_set(float x) {
    EACH(vdupq_n_f32(x));
}
static inline bw_vf bw_add(bw_vf x, bw_vf y) {
    EACH(vaddq_f32(x.q[i], y.q[i]));
}
static inline bw_vf bw_sub(bw_vf x, bw_vf y) {
    EACH(vsubq_f32(x.q[i], y.q[i]));
}
static inline bw_vf bw_mul(bw_vf x, bw_vf y) {
    EACH(vmulq_f32(x.q[i], y.q[i]));
}
static inline bw_vf bw_div(bw_vf x, bw_vf y) {
    EACH(vdivq_f32(x.q[i], y.q[i]));
}
static inline bw_vf bw_fma(bw_vf x, bw_vf y, bw_vf z) {
    EACH(vfmaq_f32(z.q[i], x.q[i], y.q[i]));
}
/* a < b ? x : y, lane by lane. */
static inline bw_vf bw_select_less(bw_vf a, bw_vf b, bw_vf x, bw_vf y) {
    EACH(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), x.q[i], y.q[i]));
}
/* Comparisons and not vminq, vmaxq: NaN and zeros of either sign must go as on the other sets. */
static inline float32x4_t lesser(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
static inline float32x4_t greater(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
static inline bw_vf bw_min(bw_vf x, bw_vf y) {
    EACH(lesser(x.q[i], y.q[i]));
}
static inline bw_vf bw_max(bw_vf x, bw_vf y) {
    EACH(greater(x.q[i], y.q[i]));
}
static inline bw_vf bw_rint(bw_vf x) {
    EACH(vrndnq_f32(x.q[i]));
}
/* 2^n for whole n in -127 .. 127 (2^-127 gives 0); anything for other n. */
static inline bw_vf bw_pow2(bw_vf n) {
    EACH(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23)));
}

/* Lane i + lane i+8, then +4, +2, +1. */
static inline float bw_sum(bw_vf x) {
    float32x4_t four = vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float bw_reduce_min(bw_vf x) {
    float32x4_t four = lesser(lesser(x.q[0], x.q[2]), lesser(x.q[1], x.q[3]));
    four = lesser(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(lesser(four, vextq_f32(four, four, 1)), 0);
}
static inline float bw_reduce_max(bw_vf x) {
    float32x4_t four = greater(greater(x.q[0], x.q[2]), greater(x.q[1], x.q[3]));
    four = greater(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(greater(four, vextq_f32(four, four, 1)), 0);
}

#include "units.h"
#include "paths.h"
#include "eights.h"
#include "../kernels/all.h"

static int supported(void) {
    return 1;
}

const bw_isa bw_isa_neon = BW_TABLE("neon", 10, supported);
