// The step of coordinate projections on the CPU: one pass over weights and gradients, many matrices in one call.
//
// W <- keep W - size sign(G) everywhere, but by AdamW where an entry is selected. Weights and gradients are fp32 or bf16,
// moments fp32, arithmetic fp32, rounded once. No operation is contracted (-ffp-contract=off): an entry gets the same bits
// in a vector and in a remainder, with any number of threads, on any layout and any processor.
//
// A plain C interface: nothing of Python or torch is included, so this builds in a few seconds with any compiler.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widened(float x) { return x; }

inline float widened(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// To the nearest, ties to even, as torch rounds.
inline void store(float* p, float x) { *p = x; }

inline void store(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

// 16 random bits of an entry of the whole parameter: rounding.random_bits, number for number.
inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

inline uint32_t random_bits(uint64_t index, uint32_t key0, uint32_t key1) {
    const uint32_t low = static_cast<uint32_t>(index) ^ key0;
    const uint32_t high = static_cast<uint32_t>(index >> 32) + key1;
    return mixed(mixed(low) + high) & 0xFFFFu;
}

// Addresses of weight, gradient and moments. `selected`: a bit for each column (COLUMNS) or entry (SINGLE), or the slot of
// each row, -1 for none (ROWS, int32). `before`: how many entries are selected before each line (SINGLE, int32). `count`:
// selected columns. For NOISE: the index of the first entry in the whole parameter, from row to row, and the keys.
struct Tile {
    int64_t weight, grad, first, second, selected, before, rows, cols, count, start, stride, key0, key1;
};

// Scalars of a call: `rate` is the learning rate over the first bias correction, `inverse` one over the root of the second.
struct Scalars {
    float keep, size, rate, beta1, rest1, beta2, rest2, eps, inverse;
};

inline float signed_step(float g, float size) { return g > 0.0f ? size : (g < 0.0f ? -size : 0.0f); }

// Rounds a line stochastically: `first` is the index of its first entry in the whole parameter.
inline void round_line(bf16* w, const float* from, int64_t n, uint64_t first, uint32_t key0, uint32_t key1) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        const uint32_t up = (bits + random_bits(first + i, key0, key1)) >> 16;
        bf16 near;
        store(&near, from[i]);
        w[i].bits = finite ? static_cast<uint16_t>(up) : near.bits;
    }
}

// Writes a line of fp32 results.
template <typename W, bool NOISE>
inline void write(W* w, const float* from, int64_t n, uint64_t first, const Tile& t) {
    if constexpr (NOISE) {
        round_line(w, from, n, first, static_cast<uint32_t>(t.key0), static_cast<uint32_t>(t.key1));
    } else {
        for (int64_t i = 0; i < n; ++i) store(w + i, from[i]);
    }
}

// `out` may be the weights themselves: every entry is read before it is written.
template <typename W, typename G>
inline void free_line(const W* w, const G* g, float* out, int64_t n, const Scalars& s) {
    const float keep = s.keep, size = s.size;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = widened(w[i]) * keep - signed_step(widened(g[i]), size);
}

template <typename W, typename G>
inline void full_line(const W* w, const G* g, float* m, float* v, float* out, int64_t n, const Scalars& s) {
    const float keep = s.keep, rate = s.rate, beta1 = s.beta1, rest1 = s.rest1, beta2 = s.beta2, rest2 = s.rest2;
    const float eps = s.eps, inverse = s.inverse;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const float x = widened(g[i]);
        const float first = m[i] * beta1 + x * rest1, second = v[i] * beta2 + x * x * rest2;
        m[i] = first;
        v[i] = second;
        out[i] = widened(w[i]) * keep - rate * first / (std::sqrt(second) * inverse + eps);
    }
}

// Selected entries of a line are packed into buffers, stepped there, and spread over the state-free step of the others.
// `bits` has one bit for every entry, from the lowest; buffers have room for 16 entries more than they need.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)

// Of 16 entries, or of fewer at the end of a line. Masked loads and stores are slow: only there.
inline __m512 load(const float* p, int64_t left) {
    return left >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(_bzhi_u32(0xFFFF, left), p);
}

inline __m512 load(const bf16* p, int64_t left) {
    const __m256i bits = left >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                    : _mm256_maskz_loadu_epi16(_bzhi_u32(0xFFFF, left), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <typename W, typename G>
inline int64_t pack(const W* w, const G* g, const uint16_t* bits, int64_t n, float* ws, float* gs) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 picked = bits[i / 16];
        _mm512_storeu_ps(ws + count, _mm512_maskz_compress_ps(picked, load(w + i, n - i)));
        _mm512_storeu_ps(gs + count, _mm512_maskz_compress_ps(picked, load(g + i, n - i)));
        count += __builtin_popcount(picked);
    }
    return count;
}

template <typename W, typename G>
inline void spread(const W* w, const G* g, const uint16_t* bits, int64_t n, const float* ws, float* out, const Scalars& s) {
    const __m512 keep = _mm512_set1_ps(s.keep), size = _mm512_set1_ps(s.size), down = _mm512_set1_ps(-s.size);
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 picked = bits[i / 16];
        const __m512 grad = load(g + i, n - i);
        __m512 step = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(grad, zero, _CMP_GT_OQ), size);
        step = _mm512_mask_mov_ps(step, _mm512_cmp_ps_mask(grad, zero, _CMP_LT_OQ), down);
        const __m512 free = _mm512_sub_ps(_mm512_mul_ps(load(w + i, n - i), keep), step);
        const __m512 all = _mm512_mask_expand_ps(free, picked, _mm512_loadu_ps(ws));
        if (n - i >= 16)
            _mm512_storeu_ps(out + i, all);
        else
            _mm512_mask_storeu_ps(out + i, _bzhi_u32(0xFFFF, n - i), all);
        ws += __builtin_popcount(picked);
    }
}

#else

template <typename W, typename G>
inline int64_t pack(const W* w, const G* g, const uint16_t* bits, int64_t n, float* ws, float* gs) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        for (uint32_t left = bits[i / 16]; left != 0; left &= left - 1, ++count) {
            const int64_t at = i + __builtin_ctz(left);
            ws[count] = widened(w[at]);
            gs[count] = widened(g[at]);
        }
    }
    return count;
}

template <typename W, typename G>
inline void spread(const W* w, const G* g, const uint16_t* bits, int64_t n, const float* ws, float* out, const Scalars& s) {
    free_line(w, g, out, n, s);
    for (int64_t i = 0; i < n; i += 16)
        for (uint32_t left = bits[i / 16]; left != 0; left &= left - 1) out[i + __builtin_ctz(left)] = *ws++;
}

#endif

constexpr int64_t FLAT = 1024;  // entries of a line where there are no rows
constexpr int64_t BLOCK = 32768;  // entries that a thread takes at a time

enum Kind { SIGN = 0, COLUMNS = 1, ROWS = 2, SINGLE = 3 };

struct Lines {
    int64_t lines, width, total;
};

inline Lines lines_of(const Tile& t, int kind) {
    const bool flat = kind == SINGLE || (kind == SIGN && t.stride == t.cols);
    const int64_t total = t.rows * t.cols;
    if (flat) return {(total + FLAT - 1) / FLAT, FLAT, total};
    return {t.rows, t.cols, total};
}

// The same for packed entries, while the `n` weights and gradients that come next are fetched: computing takes as long.
template <typename W, typename G>
inline void packed_step(float* ws, const float* gs, float* m, float* v, int64_t count, const W* w, const G* g, int64_t n,
                        const Scalars& s) {
    const int64_t share = count > 0 ? 64 * n / count + 64 : 0;
    for (int64_t j = 0, next = 0; j < count; j += 64, next += share) {
        const int64_t stop = std::min(n, next + share);
        for (int64_t i = next; i < stop; i += 64 / sizeof(W)) __builtin_prefetch(w + i, 1);
        for (int64_t i = next; i < stop; i += 64 / sizeof(G)) __builtin_prefetch(g + i, 0);
        full_line(ws + j, gs + j, m + j, v + j, ws + j, std::min<int64_t>(64, count - j), s);
    }
}

template <typename W, typename G, bool NOISE>
void step_lines(const Tile& t, int kind, int64_t from, int64_t to, const Scalars& s, std::vector<float>& buffer) {
    float *m = reinterpret_cast<float*>(t.first), *v = reinterpret_cast<float*>(t.second);
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(t.selected);
    const int32_t* slots = reinterpret_cast<const int32_t*>(kind == SINGLE ? t.before : t.selected);
    const Lines all = lines_of(t, kind);
    // Short lines with selected columns are packed together: what was just written is slow to read.
    const int64_t together = kind == COLUMNS ? std::max<int64_t>(1, FLAT / all.width) : 1, room = together * all.width + 16;
    buffer.resize(3 * room);
    float *ws = buffer.data(), *gs = ws + room, *lines = gs + room;
    for (int64_t top = from; top < to; top += together) {
        const int64_t bottom = std::min(to, top + together);
        const int64_t begin = top * all.width, n = std::min(bottom * all.width, all.total) - begin;
        W* w = reinterpret_cast<W*>(t.weight) + begin;
        const G* g = reinterpret_cast<const G*>(t.grad) + begin;
        float* out = lines;
        if constexpr (std::is_same_v<W, float>) out = w;  // in place
        if (kind == COLUMNS) {
            const int64_t slot = top * t.count, width = all.width;
            int64_t count = 0;
            for (int64_t i = 0; i < n; i += width) count += pack(w + i, g + i, bits, width, ws + count, gs + count);
            packed_step(ws, gs, m + slot, v + slot, count, w + n, g + n, std::min(n, all.total - begin - n), s);
            for (int64_t i = 0; i < n; i += width) spread(w + i, g + i, bits, width, ws + i / width * t.count, out + i, s);
        } else if (kind == SINGLE) {
            const uint16_t* mine = bits + begin / 16;
            const int64_t count = pack(w, g, mine, n, ws, gs);
            const int64_t slot = slots[top];
            packed_step(ws, gs, m + slot, v + slot, count, w + n, g + n, std::min(n, all.total - begin - n), s);
            spread(w, g, mine, n, ws, out, s);
        } else if (kind == ROWS && slots[top] >= 0) {
            const int64_t slot = slots[top] * t.cols;
            full_line(w, g, m + slot, v + slot, out, n, s);
        } else {
            free_line(w, g, out, n, s);
        }
        if constexpr (!std::is_same_v<W, float>) {
            const bool rows = all.width == t.cols;
            for (int64_t i = 0; i < n; i += all.width) {
                const int64_t line = top + i / all.width, width = std::min(all.width, n - i);
                write<W, NOISE>(w + i, out + i, width, t.start + (rows ? line * t.stride : begin + i), t);
            }
        }
    }
}

using Step = void (*)(const Tile&, int, int64_t, int64_t, const Scalars&, std::vector<float>&);

Step chosen(int weights, int grads, bool noise) {
    if (weights == 0) return grads == 0 ? step_lines<float, float, false> : step_lines<float, bf16, false>;
    if (noise) return grads == 0 ? step_lines<bf16, float, true> : step_lines<bf16, bf16, true>;
    return grads == 0 ? step_lines<bf16, float, false> : step_lines<bf16, bf16, false>;
}

}  // namespace

// `tiles`: `number` rows of 13 int64, as Tile. `weights`, `grads`: 0 fp32, 1 bf16. `threads`: at most so many.
extern "C" void frugal_step(const int64_t* tiles, int64_t number, int kind, int weights, int grads, int noise,
                            const float* scalars, int threads) {
    const Tile* all = reinterpret_cast<const Tile*>(tiles);
    Scalars s;
    std::memcpy(&s, scalars, sizeof s);
    const Step step = chosen(weights, grads, noise != 0);
    std::vector<int64_t> begins(number + 1, 0), per(number, 1);
    for (int64_t i = 0; i < number; ++i) {
        const Lines lines = lines_of(all[i], kind);
        per[i] = std::max<int64_t>(1, BLOCK / std::max<int64_t>(lines.width, 1));
        begins[i + 1] = begins[i] + (lines.lines + per[i] - 1) / per[i];
    }
    const int64_t blocks = begins[number];
#pragma omp parallel num_threads(threads) if (blocks > 1 && threads > 1)
    {
        std::vector<float> buffer;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i = std::upper_bound(begins.begin(), begins.end(), block) - begins.begin() - 1;
            const int64_t from = (block - begins[i]) * per[i];
            step(all[i], kind, from, std::min(lines_of(all[i], kind).lines, from + per[i]), s, buffer);
        }
    }
}

// fp32 `wide` to bf16 `target`, both of `rows` rows of `cols` entries; `starts`: the index of each row's first entry in the
// whole parameter.
extern "C" void frugal_round(uint16_t* target, const float* wide, const int64_t* starts, int64_t rows, int64_t cols,
                             uint32_t key0, uint32_t key1, int threads) {
    bf16* out = reinterpret_cast<bf16*>(target);
    const int64_t parts = (cols + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (rows * cols > BLOCK && threads > 1) schedule(static)
    for (int64_t part = 0; part < rows * parts; ++part) {
        const int64_t row = part / parts, left = part % parts * BLOCK, n = std::min(BLOCK, cols - left);
        round_line(out + row * cols + left, wide + row * cols + left, n, starts[row] + left, key0, key1);
    }
}
