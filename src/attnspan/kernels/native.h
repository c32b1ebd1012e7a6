// What the C++ kernels share: vectors, 2^x, small matrix products, online softmax in base 2.
//
// Vectors are the compiler's own, of the widest that it was told of, so the same source serves
// AVX-512, AVX, NEON and none.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define STRIP 6
#define COLUMNS 4
#elif defined(__AVX__)
#define LANES 8
#define STRIP 6
#define COLUMNS 2
#else
#define LANES 4
#define STRIP 6
#define COLUMNS 2
#endif

namespace {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

constexpr int BLOCK = 64;               // keys at a time: a mask is one word
constexpr int WIDE = LANES * COLUMNS;   // floats of a row that one kernel call makes
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;
constexpr float NONE = -INFINITY;

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }
inline vf choose(vi c, vf a, vf b) { return (vf)((c & (vi)a) | (~c & (vi)b)); }

struct Plus {
  static vf two(vf a, vf b) { return a + b; }
  static float two(float a, float b) { return a + b; }
};
struct Most {
  static vf two(vf a, vf b) { return choose(a > b, a, b); }
  static float two(float a, float b) { return a > b ? a : b; }
};

template <int... I>
inline vf evens(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 * 2 + I % 2 * LANES)...);
}
template <int... I>
inline vf odds(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 * 2 + 1 + I % 2 * LANES)...);
}
template <int... I>
inline vf lows(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + I % 4 / 2 * LANES)...);
}
template <int... I>
inline vf highs(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * LANES)...);
}

// Folds four vectors at once, halves of pairs and then quarters, in place of lane by lane.
template <class Fold>
inline void fold(vf a, vf b, vf c, vf d, float* to) {
  std::make_integer_sequence<int, LANES> lanes;
  vf ab = Fold::two(evens(a, b, lanes), odds(a, b, lanes));
  vf cd = Fold::two(evens(c, d, lanes), odds(c, d, lanes));
  vf all = Fold::two(lows(ab, cd, lanes), highs(ab, cd, lanes));
  float fours[LANES];
  store(fours, all);
  for (int x = 0; x < 4; x++) {
    to[x] = fours[x];
    for (int i = 4; i < LANES; i += 4) to[x] = Fold::two(to[x], fours[i + x]);
  }
}

// The same for the rows of a strip.
template <class Fold>
inline void fold_strip(const vf* rows, float* to) {
  static_assert(STRIP == 6, "two folds of four take six rows");
  float rest[4];
  fold<Fold>(rows[0], rows[1], rows[2], rows[3], to);
  fold<Fold>(rows[4], rows[5], rows[4], rows[5], rest);
  to[4] = rest[0], to[5] = rest[1];
}

// 2^x for x below 128; exactly 0 below 2^-126, NaN for NaN.
inline vf exp2v(vf x) {
  vi small = x < -126.0f;
  vf t = choose(small, splat(-126.0f), x);
  vf shifted = t + 12582912.0f;  // rounds to a whole number, which stands in the low bits
  vf f = t - (shifted - 12582912.0f);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  vi power = ((vi)shifted - 0x4B400000 + 127) << 23;
  return choose(small, vf{}, p * (vf)power);
}

// Laid out as 64-byte lines.
struct Buffer {
  std::vector<float> held;
  float* at;
  explicit Buffer(size_t size) : held(size + 16) {
    at = (float*)(((uintptr_t)held.data() + 63) & ~(uintptr_t)63);
  }
};

enum Kind { F32, BF16, F16 };

struct Bf16 { uint16_t bits; };

// LANES numbers of a type, as floats.
inline vf widen(const float* p) { return load(p); }
#if defined(__AVX512F__)
inline vf widen(const int8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline vf widen(const Bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline vf widen(const _Float16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline vf widen(const int8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline vf widen(const Bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline vf widen(const _Float16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
template <class T>
inline vf widen(const T* p) {
  vf x;
  for (int i = 0; i < LANES; i++) x[i] = (float)p[i];
  return x;
}
inline vf widen(const Bf16* p) {
  vi x;
  for (int i = 0; i < LANES; i++) x[i] = (int32_t)((uint32_t)p[i].bits << 16);
  return (vf)x;
}
#endif

// A row of any width.
template <class T>
void widen_row(const T* p, float* to, int width) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) store(to + d, widen(p + d));
  if (d == width) return;
  T rest[LANES] = {};
  std::memcpy(rest, p + d, sizeof(T) * (width - d));
  float last[LANES];
  store(last, widen(rest));
  std::memcpy(to + d, last, sizeof(float) * (width - d));
}

inline void widen_row(const void* p, Kind kind, float* to, int width) {
  if (kind == F32) std::memcpy(to, p, sizeof(float) * width);
  else if (kind == BF16) widen_row((const Bf16*)p, to, width);
  else widen_row((const _Float16*)p, to, width);
}

inline uint16_t narrow_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A (batch, heads, rows, width) tensor whose last dimension is dense.
struct View {
  void* data;
  int64_t batch, head, row;  // strides, in elements
  Kind kind;

  const void* line(int64_t b, int64_t h, int64_t r) const {
    int64_t size = kind == F32 ? 4 : 2;
    return (const char*)data + size * (b * batch + h * head + r * row);
  }
  void read(float* to, int64_t b, int64_t h, int64_t r, int width, float factor = 1) const {
    widen_row(line(b, h, r), kind, to, width);
    if (factor != 1) for (int d = 0; d < width; d++) to[d] *= factor;
  }
  void write(const float* from, int64_t b, int64_t h, int64_t r, int width, float factor) const {
    void* p = (void*)line(b, h, r);
    if (kind == F32) for (int d = 0; d < width; d++) ((float*)p)[d] = from[d] * factor;
    else if (kind == BF16) for (int d = 0; d < width; d++) ((uint16_t*)p)[d] = narrow_bf16(from[d] * factor);
    else for (int d = 0; d < width; d++) ((_Float16*)p)[d] = (_Float16)(from[d] * factor);
  }
};

// C (R x V vectors) += or = A (R x depth) B (depth x V vectors).
template <int R, bool ADD, int V, class T>
inline void product(const float* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,
                    float* c, int64_t c_row, int depth) {
  vf acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = ADD ? load(c + r * c_row + v * LANES) : vf{};
  for (int k = 0; k < depth; k++) {
    vf line[V];
    for (int v = 0; v < V; v++) line[v] = widen(b + k * b_row + v * LANES);
    for (int r = 0; r < R; r++) {
      vf x = splat(a[r * a_row + k * a_step]);
      for (int v = 0; v < V; v++) acc[r][v] += x * line[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_row + v * LANES, acc[r][v]);
}

// The same for up to STRIP rows.
template <bool ADD, int V, class T>
inline void strip_product(const float* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, float* c,
                          int64_t c_row, int rows, int depth) {
  switch (rows) {
    case 1: product<1, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth); break;
    case 2: product<2, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth); break;
    case 3: product<3, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth); break;
    case 4: product<4, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth); break;
    case 5: product<5, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth); break;
    default: product<6, ADD, V>(a, a_row, a_step, b, b_row, c, c_row, depth);
  }
}

// The same for any number of rows, and a width of whole WIDEs.
template <bool ADD, class T>
void products(const float* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, float* c,
              int64_t c_row, int rows, int width, int depth) {
  for (int from = 0; from < rows; from += STRIP)
    for (int w = 0; w < width; w += WIDE)
      strip_product<ADD, COLUMNS>(a + from * a_row, a_row, a_step, b + w, b_row, c + from * c_row + w, c_row,
                                  std::min(STRIP, rows - from), depth);
}

// Scores of a strip against the keys of a block's vectors `low` to `high`: K lies a row a channel.
inline void scores(const float* q, int64_t q_row, const float* kt, float* s, int rows, int width, int low,
                   int high) {
  for (int v = low; v < high; v += COLUMNS) {
    const float* b = kt + v * LANES;
    float* c = s + v * LANES;
    int some = std::min(COLUMNS, high - v);
    if (some == 1) strip_product<false, 1>(q, q_row, 1, b, BLOCK, c, BLOCK, rows, width);
    else if (some == 2) strip_product<false, 2>(q, q_row, 1, b, BLOCK, c, BLOCK, rows, width);
    else if (some == 3) strip_product<false, 3>(q, q_row, 1, b, BLOCK, c, BLOCK, rows, width);
    else strip_product<false, COLUMNS>(q, q_row, 1, b, BLOCK, c, BLOCK, rows, width);
  }
}

inline int padded(int width) { return (width + WIDE - 1) / WIDE * WIDE; }

// Scores in base 2 of a strip, masked: `s` holds rows of 64, of which vectors `low` to `high` count.
inline void finish(float* s, const uint64_t* words, int rows, float softcap, int low = 0,
                   int high = BLOCK / LANES) {
  static const vi powers = [] {
    vi p;
    for (int i = 0; i < LANES; i++) p[i] = 1 << i;
    return p;
  }();
  for (int r = 0; r < rows; r++) {
    float* row = s + r * BLOCK;
    if (softcap > 0)
      for (int v = low * LANES; v < high * LANES; v += LANES) {
        vf x = load(row + v) * (2 * LOG2E);
        vf e = exp2v(choose(x > 126.0f, splat(126.0f), x));  // past that tanh is 1, and 2^x no float
        vf t = (e - 1.0f) / (e + 1.0f);
        store(row + v, t * (softcap * LOG2E));
      }
    if (words && words[r] != ~0ull)
      for (int v = low * LANES; v < high * LANES; v += LANES) {
        int32_t part = (int32_t)(words[r] >> v & ((1ull << LANES) - 1));
        vi seen = ((part + vi{}) & powers) != 0;
        store(row + v, choose(seen, load(row + v), splat(NONE)));
      }
  }
}

struct Softmax {
  float top = NONE, total = 0;

  float lse() const { return total == 0 ? NONE : ((top == NONE ? 0 : top) + std::log2(total)) * LN2; }
};

// Turns up to STRIP rows of scores, their vectors `low` to `high`, into weights; `keep` gets what the
// rows' earlier results must be multiplied by.
inline void take(Softmax* soft, float* s, int rows, float* keep, int low = 0, int high = BLOCK / LANES) {
  vf line[STRIP];
  float folded[STRIP], base[STRIP];
  for (int r = 0; r < STRIP; r++) {
    if (r >= rows) {
      line[r] = line[0];
      continue;
    }
    const float* row = s + r * BLOCK;
    line[r] = load(row + low * LANES);
    for (int v = (low + 1) * LANES; v < high * LANES; v += LANES) line[r] = Most::two(load(row + v), line[r]);
  }
  fold_strip<Most>(line, folded);
  for (int r = 0; r < rows; r++) {
    Softmax& x = soft[r];
    float before = x.top;
    if (folded[r] > x.top) x.top = folded[r];
    // Nothing seen yet: any finite number in its place turns minus infinity into a weight of zero.
    base[r] = x.top == NONE ? 0 : x.top;
    keep[r] = x.top == before ? 1.0f : before == NONE ? 0.0f : std::exp2(before - x.top);
    float* row = s + r * BLOCK;
    line[r] = vf{};
    for (int v = low * LANES; v < high * LANES; v += LANES) {
      vf w = exp2v(load(row + v) - base[r]);
      store(row + v, w);
      line[r] += w;
    }
  }
  fold_strip<Plus>(line, folded);
  for (int r = 0; r < rows; r++) soft[r].total = soft[r].total * keep[r] + folded[r];
}

inline uint64_t bits_between(int64_t low, int64_t high) {
  if (low < 0) low = 0;
  if (high > 64) high = 64;
  if (low >= high) return 0;
  uint64_t ones = high - low == 64 ? ~0ull : (1ull << (high - low)) - 1;
  return ones << low;
}

}  // namespace
