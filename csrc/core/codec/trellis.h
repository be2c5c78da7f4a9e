/* What a trellis code stands for, the same on every instruction set. A state of `width` bits, hashed, is the value: the
 * sum of the four bytes of state * multiplier + addend, less its mean, is near normal. States of 16 bits take the
 * constants of EXL3's codebook "mul1", which leaves as little error as any that was tried. */
#ifndef BW_CODEC_TRELLIS_H
#define BW_CODEC_TRELLIS_H

#include <stddef.h>
#include <stdint.h>

#define BW_TRELLIS_MEAN 510         /* of the sum of four bytes */
#define BW_TRELLIS_DEVIATION 147.8f /* of that sum, about: weights of deviation 1 suit steps of its inverse */
#define BW_TRELLIS_STEP \
    0.0078125f /* a scale is worth so much a step, so that small matrices stay above fp16's bottom */
enum { BW_TRELLIS_SIDE = 16, BW_TRELLIS_TILE = 256, BW_TRELLIS_MOST_RATE = 5 };
enum { BW_TRELLIS_LEAST_WIDTH = 10, BW_TRELLIS_MOST_WIDTH = 16 };

/* Turned matrices: Hadamard transforms of so many rows and columns, and tiles in the order of a tensor core's operand,
 * as EXL3 has them. */
enum { BW_TURN = 128, BW_TURNED_WIDTH = 16 };
/* Column and row, within its tile, of weight number i of the sequence. */
static inline int bw_trellis_column(int i, int turned) {
    return turned ? (i & 1) | (i >> 2 & 6) | (i << 2 & 8) : i >> 4;
}
static inline int bw_trellis_row(int i, int turned) {
    return turned ? i >> 5 | (i << 1 & 8) : i & 15;
}
/* Signs of rows and columns, the same for each 128. They are a bent function's: what is equal in all rows or columns
 * does not add up in one place, but has the same size, at most 2^4 of 2^7, all over the transform. */
static inline int bw_turn_sign(ptrdiff_t i) {
    return 1 - 2 * __builtin_parity((unsigned)(i & i >> 1 & 0x15));
}

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
