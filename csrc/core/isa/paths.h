/* The trellis in plain C, for sets without instructions that help: 32 whole numbers of 16 bits for the search of paths,
 * signed for values, unsigned for costs; sixteen states at once, one a row of a column. */
typedef struct {
    uint16_t v[32];
} bw_w16;

#define EACH16(expression)                                        \
    bw_w16 r;                                                     \
    for (int i = 0; i < 32; i++) r.v[i] = (uint16_t)(expression); \
    return r

static inline int32_t saturate16(int32_t x) {
    return x < -32768 ? -32768 : x > 32767 ? 32767 : x;
}
static inline bw_w16 bw_load16(const void *p) {
    bw_w16 r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline void bw_store16(void *p, bw_w16 x) {
    memcpy(p, x.v, sizeof x.v);
}
static inline bw_w16 bw_set16(int x) {
    EACH16(x);
}
static inline bw_w16 bw_subs16(bw_w16 x, bw_w16 y) { /* signed, saturating */
    EACH16(saturate16((int16_t)x.v[i] - (int16_t)y.v[i]));
}
static inline bw_w16 bw_adds16(bw_w16 x, bw_w16 y) { /* signed, saturating */
    EACH16(saturate16((int16_t)x.v[i] + (int16_t)y.v[i]));
}
static inline bw_w16 bw_mul16(bw_w16 x, bw_w16 y) { /* x y / 2^15, rounded; 2^15 (unsigned) for both at -2^15 */
    EACH16(((int16_t)x.v[i] * (int16_t)y.v[i] + (1 << 14)) >> 15);
}
static inline bw_w16 bw_addu16(bw_w16 x, bw_w16 y) { /* unsigned, saturating */
    EACH16(x.v[i] + y.v[i] > 65535 ? 65535 : x.v[i] + y.v[i]);
}
static inline bw_w16 bw_minu16(bw_w16 x, bw_w16 y) {
    EACH16(x.v[i] < y.v[i] ? x.v[i] : y.v[i]);
}
static inline bw_w16 bw_sub16(bw_w16 x, bw_w16 y) { /* modulo 2^16 */
    EACH16(x.v[i] - y.v[i]);
}
/* Lane i = p[i >> rate]. */
static inline bw_w16 bw_repeat16(const uint16_t *p, int rate) {
    EACH16(p[i >> rate]);
}
static inline int bw_least16(bw_w16 x) {
    int least = 65535;
    for (int i = 0; i < 32; i++) least = x.v[i] < least ? x.v[i] : least;
    return least;
}
#undef EACH16

/* Rows, `stride` apart, of 16 columns of 16 numbers. */
static inline void bw_transpose16(const float *columns, float *rows, ptrdiff_t stride) {
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++) rows[r * stride + c] = columns[16 * c + r];
}

/* A hash, its bytes already summed. */
typedef struct {
    int32_t v[16];
} bw_hash;
typedef bw_hash bw_w32;
typedef struct {
    int rate, width;
} bw_windows;
enum { DIGIT_PLANES = 1 };

/* The window of row r ends rate * (15 - r) bits before the end of the column's bytes, which count from the top. */
static inline bw_windows bw_read_windows(int rate, int width) {
    return (bw_windows){rate, width};
}
/* From the 16 bytes before `end`. */
static inline bw_hash bw_hash_column(const uint8_t *end, const bw_windows *w) {
    bw_hash hash;
    for (int r = 0; r < 16; r++) {
        int below = w->rate * (15 - r);
        const uint8_t *p = end - below / 8;
        uint32_t bits = (uint32_t)p[-1] | (uint32_t)p[-2] << 8 | (uint32_t)p[-3] << 16 | (uint32_t)p[-4] << 24;
        uint32_t state = bits >> (below & 7) & ((1u << w->width) - 1);
        hash.v[r] = bw_trellis_value(state, w->width) + BW_TRELLIS_MEAN;
    }
    return hash;
}
static inline bw_w32 bw_set32(int32_t x) {
    bw_w32 r;
    for (int i = 0; i < 16; i++) r.v[i] = x;
    return r;
}
static inline bw_vf bw_float32(bw_w32 x) {
    float f[16];
    for (int i = 0; i < 16; i++) f[i] = (float)x.v[i];
    return bw_load(f);
}
static inline bw_w32 bw_add32(bw_w32 x, bw_w32 y) {
    for (int i = 0; i < 16; i++) x.v[i] += y.v[i];
    return x;
}
static inline bw_w32 bw_join32(bw_w32 high, bw_w32 low) {
    (void)low;
    return high;
}
static inline int32_t bw_digit(int32_t n, int digits, int plane) {
    (void)digits, (void)plane;
    return n;
}
/* sum + (sum of the hash's bytes) * x */
static inline bw_w32 bw_dot_hash(bw_w32 sum, bw_hash hash, int32_t x) {
    for (int i = 0; i < 16; i++) sum.v[i] += hash.v[i] * x;
    return sum;
}
