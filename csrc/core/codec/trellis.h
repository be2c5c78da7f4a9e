/* What a trellis code stands for, the same on every instruction set. A state of `width` bits, hashed, is the value: the
 * sum of the four bytes of state * multiplier + addend, less its mean, is near normal. States of 16 bits take the
 * constants of EXL3's codebook "mul1", which leaves as little error as any that was tried. */
#ifndef BW_CODEC_TRELLIS_H
#define BW_CODEC_TRELLIS_H

#include <stdint.h>

#define BW_TRELLIS_MEAN 510         /* of the sum of four bytes */
#define BW_TRELLIS_DEVIATION 147.8f /* of that sum, about: weights of deviation 1 suit steps of its inverse */
#define BW_TRELLIS_STEP \
    0.0078125f /* a scale is worth so much a step, so that small matrices stay above fp16's bottom */
enum { BW_TRELLIS_SIDE = 16, BW_TRELLIS_TILE = 256, BW_TRELLIS_MOST_RATE = 5 };
enum { BW_TRELLIS_LEAST_WIDTH = 10, BW_TRELLIS_MOST_WIDTH = 16 };

static inline uint32_t bw_trellis_multiplier(int width) {
    return width == 16 ? 0x83dcd12du : 34038481u;
}
static inline uint32_t bw_trellis_addend(int width) {
    return width == 16 ? 0 : 76625530u;
}

/* -510 .. 510 */
static inline int bw_trellis_value(uint32_t state, int width) {
    uint32_t h = state * bw_trellis_multiplier(width) + bw_trellis_addend(width);
    return (int)((h & 255u) + (h >> 8 & 255u) + (h >> 16 & 255u) + (h >> 24)) - BW_TRELLIS_MEAN;
}

#endif
