/* Conversions between fp32 and the two 16-bit formats, one value at a time, without special instructions.
 * They define what the vector versions must give: nearest, ties to even. */
#ifndef BW_FLOAT16_H
#define BW_FLOAT16_H

#include <stdint.h>
#include <string.h>

static inline float bw_float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t bw_bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float bw_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 31) return bw_float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return bw_float_of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
    float value = (float)mantissa * 0x1p-24f; /* subnormal: exact */
    return sign ? -value : value;
}

static inline uint16_t bw_to_f16(float f) {
    uint32_t bits = bw_bits_of_float(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu)); /* NaN */
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to infinity */
    if (magnitude < 0x38800000u) {                                   /* subnormal: let fp32 addition do the rounding */
        float scaled = bw_float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (bw_bits_of_float(scaled) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

/* The smallest fp16 number that is not below f (f >= 0); infinity when there is none. */
static inline uint16_t bw_to_f16_up(float f) {
    uint16_t h = bw_to_f16(f);
    return bw_from_f16(h) < f ? (uint16_t)(h + 1) : h;
}

static inline float bw_from_bf16(uint16_t h) {
    return bw_float_of_bits((uint32_t)h << 16);
}

static inline uint16_t bw_to_bf16(float f) {
    uint32_t bits = bw_bits_of_float(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u); /* keep NaN a NaN */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif
