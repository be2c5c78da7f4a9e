/* Units of 64 codes in plain C on top of the vector vocabulary, for sets without bytes to shuffle: a unit is 64 bytes,
 * a span its address, whole numbers are int16_t in the order of the columns. */
#define BW_PLAIN_UNITS

typedef struct {
    uint8_t v[64];
} bw_codes;
typedef struct {
    int bits;
} bw_reader;
typedef struct {
    const uint8_t *p;
} bw_span;

/* x[lanes[i]] for each lane; lanes below 8. */
static inline bw_vf bw_spread(bw_vf x, const int32_t *lanes) {
    float from[16], to[16];
    bw_store(from, x);
    for (int i = 0; i < 16; i++) to[i] = from[lanes[i]];
    return bw_load(to);
}
/* Each of four vectors folded to one number. */
static inline void bw_sum_four(const bw_vf *x, float *out) {
    for (int i = 0; i < 4; i++) out[i] = bw_sum(x[i]);
}
static inline void bw_min_four(const bw_vf *x, float *out) {
    for (int i = 0; i < 4; i++) out[i] = bw_reduce_min(x[i]);
}
static inline void bw_max_four(const bw_vf *x, float *out) {
    for (int i = 0; i < 4; i++) out[i] = bw_reduce_max(x[i]);
}

static inline bw_reader bw_read_dense(int bits) {
    return (bw_reader){bits};
}
static inline bw_span bw_open_dense(const uint8_t *p, const bw_reader *reader) {
    (void)reader;
    return (bw_span){p};
}
static inline bw_codes bw_take_dense(const bw_span *span, const bw_reader *reader) {
    bw_codes codes;
    uint64_t mask = 0x0101010101010101u * (uint64_t)((1 << reader->bits) - 1);
    for (int i = 0; i < 8; i++) {
        uint64_t eight = 0;
        memcpy(&eight, span->p + i * reader->bits, (size_t)reader->bits);
        eight = bw_pdep(eight, mask);
        memcpy(codes.v + 8 * i, &eight, 8);
    }
    return codes;
}
static inline bw_reader bw_read_ternary(void) {
    return (bw_reader){0};
}
static inline bw_span bw_open_ternary(const uint8_t *p) {
    return (bw_span){p};
}
static inline bw_codes bw_take_ternary(const bw_span *span, int k, const bw_reader *reader) {
    (void)reader;
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    bw_codes codes;
    for (int i = 0; i < 64; i++) codes.v[i] = span->p[(64 * k + i) / 5] / powers[(64 * k + i) % 5] % 3;
    return codes;
}
/* Codes 16k .. 16k+15 as numbers. */
static inline bw_vf bw_code_floats(bw_codes codes, int k) {
    return bw_load_u8(codes.v + 16 * k);
}
static inline void bw_store_digits(void *record, const bw_vf *whole, int digits, int order) {
    (void)order;
    (void)digits;
    int16_t n[64];
    for (int k = 0; k < 4; k++) {
        float values[16];
        bw_store(values, whole[k]);
        for (int i = 0; i < 16; i++) n[16 * k + i] = (int16_t)values[i];
    }
    memcpy(record, n, sizeof n);
}
/* Sums of four products a lane: codes times whole numbers. */
static inline bw_vf bw_dot(bw_codes codes, const char *record, int digits) {
    (void)digits;
    int16_t n[64];
    float sums[16];
    memcpy(n, record, sizeof n);
    for (int i = 0; i < 16; i++) {
        int sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; j++) sum += codes.v[j] * n[j];
        sums[i] = (float)sum;
    }
    return bw_load(sums);
}
