/* Every coding, chosen by the number of levels. A new coding is a header beside this one and its line here. */
#include "dense.h"
#include "ternary.h"

static void pack(const uint8_t *codes, ptrdiff_t n, int32_t levels, uint8_t *packed) {
    if (levels == 3) ternary_pack(codes, n, packed);
    else dense_pack(codes, n, bw_level_bits(levels), packed);
}

/* Returns the largest code, or more when a byte is invalid. */
static int unpack(const uint8_t *packed, ptrdiff_t n, int32_t levels, uint8_t *codes) {
    if (levels == 3) return ternary_unpack(packed, n, codes);
    return dense_unpack(packed, n, bw_level_bits(levels), codes);
}
