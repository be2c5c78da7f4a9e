/* Rows to fp32 and back. Unit stride goes through vectors, other strides one by one. */

static inline float get_value(const bw_matrix *m, const char *p) {
    uint16_t half;
    float value;
    if (m->dtype == BW_F32) {
        memcpy(&value, p, 4);
        return value;
    }
    memcpy(&half, p, 2);
    return m->dtype == BW_F16 ? bw_from_f16(half) : bw_from_bf16(half);
}

static void load_row(const bw_matrix *m, ptrdiff_t row, ptrdiff_t first, ptrdiff_t n, float *out) {
    ptrdiff_t size = m->dtype == BW_F32 ? 4 : 2, i = 0;
    const char *p = (const char *)m->data + (row * m->row_stride + first * m->col_stride) * size;
    if (m->col_stride == 1) {
        if (m->dtype == BW_F32) {
            memcpy(out, p, (size_t)n * 4);
            return;
        }
        if (m->dtype == BW_F16)
            for (; i + 16 <= n; i += 16) bw_store(out + i, bw_load_f16(p + 2 * i));
        else
            for (; i + 16 <= n; i += 16) bw_store(out + i, bw_load_bf16(p + 2 * i));
    }
    for (; i < n; i++) out[i] = get_value(m, p + i * m->col_stride * size);
}

static void store(const float *values, ptrdiff_t n, bw_dtype dtype, void *out) {
    char *p = out;
    ptrdiff_t i = 0;
    if (dtype == BW_F32) {
        memcpy(out, values, (size_t)n * 4);
        return;
    }
    if (dtype == BW_F16)
        for (; i + 16 <= n; i += 16) bw_store_f16(p + 2 * i, bw_load(values + i));
    else
        for (; i + 16 <= n; i += 16) bw_store_bf16(p + 2 * i, bw_load(values + i));
    for (; i < n; i++) {
        uint16_t half = dtype == BW_F16 ? bw_to_f16(values[i]) : bw_to_bf16(values[i]);
        memcpy(p + 2 * i, &half, 2);
    }
}
