/* What instructions call. A marker names each function and those that it calls.

   Currents and membranes are current_t, sums int32_t. Spikes are bits of uint32_t words, channel 0 the lowest bit of a
   place's first. Where a neuron may fire SPIKES times in a time step, as many words follow one another for the same 32
   channels, a bit of the n-th set where there are at least n spikes. Arrays are row by row, channels last. */

//// scaled
/* x * multiplier / 2^shift, rounded half up; bounds are proven before this is written. */
static int32_t scaled(int32_t x, int32_t multiplier, int shift)
{
    int32_t product = x * multiplier;
    if (shift == 0) {
        return product;
    }
    product += (int32_t)1 << (shift - 1);
    return product >= 0 ? product >> shift : ~(~product >> shift);
}

//// lowest
/* Place of the lowest bit of a word that is not 0. */
static int lowest(uint32_t word)
{
#if defined(__GNUC__)
    return __builtin_ctz(word);
#else
    int place = 0;
    while (!(word & 1u)) {
        word >>= 1;
        place++;
    }
    return place;
#endif
}

//// weights
/* Weights of one input for all outputs are a row, as many a byte as go into one, the first of them lowest; zeros fill
   the last byte. */
#define A_BYTE (8 / STORED_BITS)
#define ROW(count) (((count) + A_BYTE - 1) / A_BYTE)

#if STORED_BITS == 8
typedef int8_t weights_t;

static inline int32_t weight(const weights_t *row, int at)
{
    return row[at];
}
#else
#define MASK ((1u << STORED_BITS) - 1u)
#define SIGN (1u << (STORED_BITS - 1))
typedef uint8_t weights_t;

static inline int32_t weight(const weights_t *row, int at)
{
    uint32_t own = ((uint32_t)row[at / A_BYTE] >> (STORED_BITS * (at % A_BYTE))) & MASK;
    return (int32_t)(own ^ SIGN) - (int32_t)SIGN;
}
#endif

static inline void add_row(const weights_t *row, int count)
{
    for (int o = 0; o < count; o += A_BYTE, row++) {
        for (int i = 0; i < A_BYTE; i++) {
            sums[o + i] += weight(row, i);
        }
    }
}

static inline void add_times(const weights_t *row, int count, int32_t value)
{
    for (int o = 0; o < count; o += A_BYTE, row++) {
        for (int i = 0; i < A_BYTE; i++) {
            sums[o + i] += value * weight(row, i);
        }
    }
}

//// stored
/* A value as a current keeps it: the nearest that it can say. */
static inline current_t stored(int32_t value)
{
#if CLIPS && defined(__ARM_FEATURE_SAT)
    value = __ssat(value, CURRENT_BITS); /* which compilers do not see in what is below */
#elif CLIPS
    value = value < LEAST ? LEAST : value > MOST ? MOST : value;
#endif
    return (current_t)value;
}

//// finish: stored
/* Sums of one place, scaled, to where they belong. */
static void finish(current_t *target, int out, const int16_t *m, const uint8_t *s, const int32_t *bias, int add)
{
    for (int o = 0; o < out; o++) {
        int32_t value = scaled(sums[o], m[o], s[o]) + bias[o];
        target[o] = stored(add ? target[o] + value : value);
    }
}

//// convolve_image: scaled stored finish weights
static void convolve_image(const uint8_t *image, current_t *target, int h, int w, int c, int out, int kh, int kw,
                           int apart, int stride, const weights_t *weights, const int16_t *m, const uint8_t *s,
                           const int32_t *bias, int add)
{
    for (int y = 0; y < h; y += stride) {
        for (int x = 0; x < w; x += stride, target += out) {
            memset(sums, 0, (size_t)out * sizeof *sums);
            for (int i = 0; i < kh; i++) {
                int row = y + apart * (i - kh / 2);
                for (int j = 0; j < kw; j++) {
                    int column = x + apart * (j - kw / 2);
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < c; k++) {
                        int32_t value = table[image[(row * w + column) * c + k] * c + k];
                        add_times(weights + ((i * kw + j) * c + k) * ROW(out), out, value);
                    }
                }
            }
            finish(target, out, m, s, bias, add);
        }
    }
}

//// convolve_spikes: scaled stored finish weights lowest
static void convolve_spikes(const uint32_t *spikes, current_t *target, int h, int w, int c, int out, int kh, int kw,
                            int apart, const weights_t *weights, const int16_t *m, const uint8_t *s,
                            const int32_t *bias, int add)
{
    int words = (c + 31) / 32 * SPIKES;
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += out) {
            memset(sums, 0, (size_t)out * sizeof *sums);
            for (int i = 0; i < kh; i++) {
                int row = y + apart * (i - kh / 2);
                if (row < 0 || row >= h) {
                    continue;
                }
                for (int j = 0; j < kw; j++) {
                    int column = x + apart * (j - kw / 2);
                    if (column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < words; k++) {
                        uint32_t word = spikes[(row * w + column) * words + k];
                        while (word) {
                            add_row(weights + ((i * kw + j) * c + 32 * (k / SPIKES) + lowest(word)) * ROW(out), out);
                            word &= word - 1u;
                        }
                    }
                }
            }
            finish(target, out, m, s, bias, add);
        }
    }
}

//// convolve_currents: scaled stored finish weights
static void convolve_currents(const current_t *source, current_t *target, int h, int w, int c, int out, int kh, int kw,
                              int apart, const weights_t *weights, const int16_t *m, const uint8_t *s,
                              const int32_t *bias, int add)
{
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += out) {
            memset(sums, 0, (size_t)out * sizeof *sums);
            for (int i = 0; i < kh; i++) {
                int row = y + apart * (i - kh / 2);
                for (int j = 0; j < kw; j++) {
                    int column = x + apart * (j - kw / 2);
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < c; k++) {
                        int32_t value = source[(row * w + column) * c + k];
                        add_times(weights + ((i * kw + j) * c + k) * ROW(out), out, value);
                    }
                }
            }
            finish(target, out, m, s, bias, add);
        }
    }
}

//// depthwise_spikes: scaled stored finish weights lowest
static void depthwise_spikes(const uint32_t *spikes, current_t *target, int h, int w, int c, int out, int kh, int kw,
                             int apart, const weights_t *weights, const int16_t *m, const uint8_t *s,
                             const int32_t *bias, int add)
{
    int words = (c + 31) / 32 * SPIKES;
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += out) {
            memset(sums, 0, (size_t)out * sizeof *sums);
            for (int i = 0; i < kh; i++) {
                int row = y + apart * (i - kh / 2);
                for (int j = 0; j < kw; j++) {
                    int column = x + apart * (j - kw / 2);
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < words; k++) {
                        uint32_t word = spikes[(row * w + column) * words + k];
                        while (word) {
                            int channel = 32 * (k / SPIKES) + lowest(word);
                            sums[channel] += weight(weights + (i * kw + j) * ROW(c), channel);
                            word &= word - 1u;
                        }
                    }
                }
            }
            finish(target, out, m, s, bias, add);
        }
    }
}

//// depthwise_currents: scaled stored finish weights
static void depthwise_currents(const current_t *source, current_t *target, int h, int w, int c, int out, int kh, int kw,
                               int apart, const weights_t *weights, const int16_t *m, const uint8_t *s,
                               const int32_t *bias, int add)
{
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += out) {
            memset(sums, 0, (size_t)out * sizeof *sums);
            for (int i = 0; i < kh; i++) {
                int row = y + apart * (i - kh / 2);
                for (int j = 0; j < kw; j++) {
                    int column = x + apart * (j - kw / 2);
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < c; k++) {
                        sums[k] += source[(row * w + column) * c + k] * weight(weights + (i * kw + j) * ROW(c), k);
                    }
                }
            }
            finish(target, out, m, s, bias, add);
        }
    }
}

//// affine: scaled stored
static void affine(const current_t *source, current_t *target, int places, int c, const int16_t *m, const uint8_t *s,
                   const int32_t *bias)
{
    for (int i = 0; i < places; i++) {
        for (int k = 0; k < c; k++, source++, target++) {
            *target = stored(scaled(*source, m[k], s[k]) + bias[k]);
        }
    }
}

//// shift_currents: stored
static void shift_currents(const current_t *source, current_t *target, int places, int c, int times, int add)
{
    for (int i = 0; i < places * c; i++) {
        int32_t value = (int32_t)source[i] * times;
        target[i] = stored(add ? target[i] + value : value);
    }
}

//// shift_spikes: stored lowest
static void shift_spikes(const uint32_t *spikes, current_t *target, int places, int c, int times, int add)
{
    int words = (c + 31) / 32 * SPIKES;
    if (!add) {
        memset(target, 0, (size_t)(places * c) * sizeof *target);
    }
    for (int i = 0; i < places; i++) {
        for (int k = 0; k < words; k++) {
            uint32_t word = spikes[i * words + k];
            while (word) {
                current_t *own = target + i * c + 32 * (k / SPIKES) + lowest(word);
                *own = stored(*own + times);
                word &= word - 1u;
            }
        }
    }
}

//// average_currents: scaled stored
static void average_currents(const current_t *source, current_t *target, int h, int w, int c, int window, int m, int s,
                             int add)
{
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += c) {
            memset(sums, 0, (size_t)c * sizeof *sums);
            for (int row = y - window / 2; row <= y + window / 2; row++) {
                for (int column = x - window / 2; column <= x + window / 2; column++) {
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < c; k++) {
                        sums[k] += source[(row * w + column) * c + k];
                    }
                }
            }
            for (int k = 0; k < c; k++) {
                int32_t value = scaled(sums[k], m, s);
                target[k] = stored(add ? target[k] + value : value);
            }
        }
    }
}

//// average_spikes: scaled stored lowest
static void average_spikes(const uint32_t *spikes, current_t *target, int h, int w, int c, int window, int m, int s,
                           int add)
{
    int words = (c + 31) / 32 * SPIKES;
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += c) {
            memset(sums, 0, (size_t)c * sizeof *sums);
            for (int row = y - window / 2; row <= y + window / 2; row++) {
                for (int column = x - window / 2; column <= x + window / 2; column++) {
                    if (row < 0 || row >= h || column < 0 || column >= w) {
                        continue;
                    }
                    for (int k = 0; k < words; k++) {
                        uint32_t word = spikes[(row * w + column) * words + k];
                        while (word) {
                            sums[32 * (k / SPIKES) + lowest(word)]++;
                            word &= word - 1u;
                        }
                    }
                }
            }
            for (int k = 0; k < c; k++) {
                int32_t value = scaled(sums[k], m, s);
                target[k] = stored(add ? target[k] + value : value);
            }
        }
    }
}

//// maximum: stored lowest
static void maximum(const uint32_t *spikes, current_t *target, int h, int w, int c, int window, int times, int add)
{
    int words = (c + 31) / 32 * SPIKES;
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++, target += c) {
            if (!add) {
                memset(target, 0, (size_t)c * sizeof *target);
            }
            for (int k = 0; k < words; k++) {
                uint32_t word = 0;
                for (int row = y - window / 2; row <= y + window / 2; row++) {
                    for (int column = x - window / 2; column <= x + window / 2; column++) {
                        if (row >= 0 && row < h && column >= 0 && column < w) {
                            word |= spikes[(row * w + column) * words + k];
                        }
                    }
                }
                while (word) {
                    current_t *own = target + 32 * (k / SPIKES) + lowest(word);
                    *own = stored(*own + times);
                    word &= word - 1u;
                }
            }
        }
    }
}

//// halve: scaled stored
static void halve(const current_t *source, current_t *target, int h, int w, int c)
{
    for (int y = 0; y + 1 < h; y += 2) {
        for (int x = 0; x + 1 < w; x += 2) {
            const current_t *upper = source + (y * w + x) * c, *lower = upper + w * c;
            for (int k = 0; k < c; k++, target++) {
                *target = stored(scaled((int32_t)upper[k] + upper[k + c] + lower[k] + lower[k + c], 1, 2));
            }
        }
    }
}

//// count: lowest
static void count(const uint32_t *spikes, int32_t *target, int h, int w, int c, int high, int wide, int add)
{
    int words = (c + 31) / 32 * SPIKES, rows = h / high, columns = w / wide;
    if (!add) {
        memset(target, 0, (size_t)(rows * columns * c) * sizeof *target);
    }
    for (int y = 0; y < rows * high; y++) {
        for (int x = 0; x < columns * wide; x++) {
            for (int k = 0; k < words; k++) {
                uint32_t word = spikes[(y * w + x) * words + k];
                while (word) {
                    target[(y / high * columns + x / wide) * c + 32 * (k / SPIKES) + lowest(word)]++;
                    word &= word - 1u;
                }
            }
        }
    }
}

//// multiply: weights
/* Sums over all inputs; one that is 0 costs nothing. */
static void multiply(const int32_t *source, int in, int out, const weights_t *weights)
{
    memset(sums, 0, (size_t)out * sizeof *sums);
    for (int i = 0; i < in; i++) {
        if (source[i]) {
            add_times(weights + i * ROW(out), out, source[i]);
        }
    }
}

//// linear_currents: scaled stored finish weights multiply
static void linear_currents(const int32_t *source, current_t *target, int in, int out, const weights_t *weights,
                      const int16_t *m, const uint8_t *s, const int32_t *bias)
{
    multiply(source, in, out, weights);
    finish(target, out, m, s, bias, 0);
}

//// linear_sums: scaled weights multiply
static void linear_sums(const int32_t *source, int32_t *target, int in, int out, const weights_t *weights,
                      const int16_t *m, const uint8_t *s, const int32_t *bias)
{
    multiply(source, in, out, weights);
    for (int o = 0; o < out; o++) {
        target[o] = scaled(sums[o], m[o], s[o]) + bias[o];
    }
}

//// fire: scaled stored
/* A LIF layer; how many spikes there were. */
static int32_t fire(const current_t *source, uint32_t *spikes, current_t *membrane, int places, int c, int leak,
                    int shift, int threshold, int reset, int soft)
{
    int words = (c + 31) / 32 * SPIKES;
    int32_t fired = 0;
    for (int i = 0; i < places; i++, spikes += words) {
        memset(spikes, 0, (size_t)words * sizeof *spikes);
        for (int k = 0; k < c; k++, source++, membrane++) {
            int32_t v = *membrane + scaled(*source - (*membrane - reset), leak, shift);
            for (int n = 0; n < SPIKES && v >= threshold; n++) {
                spikes[k / 32 * SPIKES + n] |= (uint32_t)1 << (k % 32);
                fired++;
                v = soft ? v - threshold : reset;
            }
            *membrane = stored(v);
        }
    }
    return fired;
}
