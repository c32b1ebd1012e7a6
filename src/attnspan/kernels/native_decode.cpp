// Attention of a few queries over a long cache, read as it is stored.
//
// The query heads of a KV head stand as its queries, so keys and values are read once for them. A
// task is a run of keys of one KV head; what the runs give is merged in their order. Codes are
// widened 64 keys at a time, their scales put on scores and weights where they can be, so no dense
// copy of the cache ever stands. One softmax runs over all parts of what a cache holds.

#include "native.h"

namespace {

constexpr int64_t RUN = 1024;  // keys of a task

enum Storage { DENSE, INT8, INT4 };

// A tensor (batch, heads, keys, any) by its first element and strides.
struct Field {
  const char* data;
  int64_t batch, head, key;  // in bytes

  template <class T>
  const T* at(int64_t b, int64_t h, int64_t j) const {
    return (const T*)(data + b * batch + h * head + j * key);
  }
};

struct Part {
  Storage storage;
  int64_t n;
  Field query;  // `keys` here are the queries
  Field key, value, key_scale, value_scale, value_least, mean;
  int group;           // channels that share a key's scale in int4
  const float *cos, *sin;  // (n, turned / 2), rows `angle_row` apart; null: keys are rotated
  int turned;
  int64_t angle_row;
  bool interleaved;
  const float* mask;  // (queries, n), added to scores; null: all seen
};

struct Call {
  int64_t batch, heads, kv_heads, queries;
  int width, value_width;
  Kind kind;
  float scale, softcap;
  const float* sink;  // (heads); null: none
  float *out, *lse, *total;  // total: (batch, kv_heads, keys of all parts); null: not wanted
  std::vector<Part> parts;

  int rows() const { return (int)(heads / kv_heads * queries); }
  int64_t keys() const {
    int64_t n = 0;
    for (const Part& part : parts) n += part.n;
    return n;
  }
};

inline float half(const Field& x, int64_t b, int64_t h, int64_t j, int at = 0) {
  return (float)x.at<_Float16>(b, h, j)[at];
}

void turn(float* x, const float* cos, const float* sin, int turned, bool interleaved) {
  int half_width = turned / 2;
  if (interleaved)
    for (int i = 0; i < half_width; i++) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  else
    for (int i = 0; i < half_width; i++) {
      float a = x[i], b = x[half_width + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half_width + i] = b * cos[i] + a * sin[i];
    }
}

struct Thread {
  const Call& call;
  int rows, width, values;
  Buffer query, key, value, scores;
  float key_scale[BLOCK] = {}, value_scale[BLOCK] = {}, value_least[BLOCK] = {};
  std::vector<float> least;  // of a row: the sum of weights times what int4 values are counted from

  explicit Thread(const Call& c)
      : call(c), rows(c.rows()), width((c.width + LANES - 1) / LANES * LANES),
        values(padded(c.value_width)), query((size_t)(rows + 3) * width), key((size_t)BLOCK * width),
        value((size_t)BLOCK * values), scores((size_t)(rows + 3) * BLOCK), least(rows) {
    std::memset(key.at, 0, sizeof(float) * BLOCK * width);
    std::memset(value.at, 0, sizeof(float) * BLOCK * values);
  }

  void read_queries(const Part& part, int64_t b, int64_t kv) {
    std::memset(query.at, 0, sizeof(float) * (rows + 3) * width);  // scores are made by fours
    float factor = call.softcap > 0 ? call.scale / call.softcap : call.scale * LOG2E;
    for (int r = 0; r < rows; r++) {
      float* to = query.at + r * width;
      int64_t head = kv * (call.heads / call.kv_heads) + r / call.queries;
      widen_row(part.query.at<char>(b, head, r % call.queries), call.kind, to, call.width);
      for (int d = 0; d < call.width; d++) to[d] *= factor;
    }
  }

  // Scales of a block, and its keys and values as fp32 rows where they can't be read in place.
  void read_block(const Part& part, int64_t b, int64_t kv, int64_t from, int count, bool in_place) {
    for (int j = 0; j < count; j++) {
      int64_t at = from + j;
      float *k = key.at + j * width, *v = value.at + j * values;
      if (part.storage == INT8) {
        key_scale[j] = half(part.key_scale, b, kv, at);
        value_scale[j] = half(part.value_scale, b, kv, at);
        if (in_place) continue;
        widen_row(part.key.at<int8_t>(b, kv, at), k, call.width);
        widen_row(part.value.at<int8_t>(b, kv, at), v, call.value_width);
      } else if (part.storage == INT4) {
        value_scale[j] = half(part.value_scale, b, kv, at);
        value_least[j] = half(part.value_least, b, kv, at);
        for (int d = 0; d < call.width / 2; d += 64) __builtin_prefetch(part.key.at<char>(b, kv, at + BLOCK) + d);
        for (int d = 0; d < call.value_width / 2; d += 64)
          __builtin_prefetch(part.value.at<char>(b, kv, at + BLOCK) + d);
        unpack(part.key.at<uint8_t>(b, kv, at), k, call.width, 8);
        unpack(part.value.at<uint8_t>(b, kv, at), v, call.value_width, 0);
        const float* mean = part.mean.at<float>(b, kv, 0);
        for (int g = 0; g < call.width / part.group; g++) {
          float scale = half(part.key_scale, b, kv, at, g);
          for (int d = g * part.group; d < (g + 1) * part.group; d++) k[d] = k[d] * scale + mean[d];
        }
      } else if (!in_place) {
        widen_row(part.key.at<char>(b, kv, at), call.kind, k, call.width);
        widen_row(part.value.at<char>(b, kv, at), call.kind, v, call.value_width);
      }
      if (part.cos) {
        int64_t row = at * part.angle_row;
        turn(k, part.cos + row, part.sin + row, part.turned, part.interleaved);
      }
    }
  }

  static void unpack(const uint8_t* p, float* to, int width, int less) {
    for (int d = 0; d < width / 2; d++) {
      to[d] = (float)((p[d] & 15) - less);
      to[width / 2 + d] = (float)((p[d] >> 4) - less);
    }
  }

  // Scores of four rows from `r` on.
  template <class T>
  void dots(int r, const T* keys, int64_t key_row, const T* lines, int64_t value_row, int count, bool scaled) {
    alignas(64) float found[BLOCK][4];
    const float* q = query.at + r * width;
    for (int j = 0; j < count; j++) {
      if (r == 0) {  // the next block's rows come while this one's are worked on
        const char *k = (const char*)(keys + (j + BLOCK) * key_row), *v = (const char*)(lines + (j + BLOCK) * value_row);
        for (size_t at = 0; at < call.width * sizeof(T); at += 64) __builtin_prefetch(k + at);
        for (size_t at = 0; at < call.value_width * sizeof(T); at += 64) __builtin_prefetch(v + at);
      }
      vf a{}, b{}, c{}, d{};
      for (int at = 0; at < width; at += LANES) {
        vf k = widen(keys + j * key_row + at);
        a += load(q + at) * k;
        b += load(q + width + at) * k;
        c += load(q + 2 * width + at) * k;
        d += load(q + 3 * width + at) * k;
      }
      fold<Plus>(a, b, c, d, found[j]);
    }
    for (int x = 0; x < 4; x++) {
      float* row = scores.at + (r + x) * BLOCK;
      for (int j = 0; j < count; j++) row[j] = scaled ? found[j][x] * key_scale[j] : found[j][x];
    }
  }

  // Keys `from` to `to` of a part. `soft` and `out` have a row for each query; `kept`, if wanted,
  // gets the scores, a row of `stride` for each query.
  void run(const Part& part, int64_t b, int64_t kv, int64_t from, int64_t to, Softmax* soft, float* out,
           float* kept, int64_t stride) {
    read_queries(part, b, kv);
    std::fill(least.begin(), least.end(), 0.0f);
    bool in_place = part.storage != INT4 && !part.cos && call.width % LANES == 0 && call.value_width % WIDE == 0;
    for (int64_t start = from; start < to; start += BLOCK) {
      int count = (int)std::min<int64_t>(BLOCK, to - start);
      if (part.storage != DENSE || !in_place) read_block(part, b, kv, start, count, in_place);
      float* keep = kept ? kept + start : nullptr;
      if (!in_place) block(part, key.at, width, value.at, values, start, count, soft, out, keep, stride);
      else if (part.storage == INT8) stored<int8_t>(part, b, kv, start, count, soft, out, keep, stride);
      else if (call.kind == F32) stored<float>(part, b, kv, start, count, soft, out, keep, stride);
      else if (call.kind == BF16) stored<Bf16>(part, b, kv, start, count, soft, out, keep, stride);
      else stored<_Float16>(part, b, kv, start, count, soft, out, keep, stride);
    }
    if (part.storage == INT4)
      for (int r = 0; r < rows; r++)
        for (int d = 0; d < call.value_width; d++) out[r * values + d] += least[r];
  }

  template <class T>
  void stored(const Part& part, int64_t b, int64_t kv, int64_t start, int count, Softmax* soft, float* out,
              float* kept, int64_t stride) {
    block(part, part.key.at<T>(b, kv, start), part.key.key / sizeof(T), part.value.at<T>(b, kv, start),
          part.value.key / sizeof(T), start, count, soft, out, kept, stride);
  }

  template <class T>
  void block(const Part& part, const T* keys, int64_t key_row, const T* lines, int64_t value_row, int64_t start,
             int count, Softmax* soft, float* out, float* kept, int64_t stride) {
    for (int r = 0; r < rows; r += 4) dots(r, keys, key_row, lines, value_row, count, part.storage == INT8);
    uint64_t inside = bits_between(0, count);
    for (int r = 0; r < rows; r++) {
      float* row = scores.at + r * BLOCK;
      if (count < BLOCK) std::memset(row + count, 0, sizeof(float) * (BLOCK - count));
      finish(row, &inside, 1, call.softcap);
      if (part.mask) {
        const float* mask = part.mask + (r % call.queries) * part.n + start;
        for (int j = 0; j < count; j++) row[j] += mask[j] * LOG2E;
      }
      if (kept) std::memcpy(kept + r * stride, row, sizeof(float) * count);
    }
    for (int first = 0; first < rows; first += STRIP) {
      float keep[STRIP];
      int some = std::min(STRIP, rows - first);
      take(soft + first, scores.at + first * BLOCK, some, keep);
      for (int r = first; r < first + some; r++) {
        if (keep[r - first] == 1.0f) continue;
        least[r] *= keep[r - first];
        float* to = out + r * values;
        for (int d = 0; d < values; d += LANES) store(to + d, load(to + d) * keep[r - first]);
      }
    }
    for (int r = 0; r < rows && part.storage != DENSE; r++) {
      float *row = scores.at + r * BLOCK, below[LANES];
      vf under{};  // weights past the last key are zero, whatever stands beside them
      for (int v = 0; v < BLOCK; v += LANES) {
        vf weight = load(row + v);
        if (part.storage == INT4) under += weight * load(value_least + v);
        store(row + v, weight * load(value_scale + v));
      }
      store(below, under);
      for (int i = 0; i < LANES && part.storage == INT4; i++) least[r] += below[i];
    }
    products<true>(scores.at, BLOCK, 1, lines, value_row, out, values, rows, values, count);
  }
};

struct Task {
  int64_t part, from, to, before;  // `before`: keys of earlier parts
};

}  // namespace

extern "C" void attnspan_decode(const int64_t* a, double scale, double softcap) {
  Call call{};
  call.batch = a[0], call.heads = a[1], call.kv_heads = a[2], call.queries = a[3];
  call.width = (int)a[4], call.value_width = (int)a[5], call.kind = (Kind)a[6];
  call.sink = (const float*)a[8];
  call.out = (float*)a[9], call.lse = (float*)a[10], call.total = (float*)a[11];
  call.scale = (float)scale, call.softcap = (float)softcap;
  const int64_t* at = a + 12;
  for (int64_t i = 0; i < a[7]; i++) {
    Part part{};
    part.storage = (Storage)at[0], part.n = at[1], part.group = (int)at[2];
    part.cos = (const float*)at[3], part.sin = (const float*)at[4];
    part.turned = (int)at[5], part.angle_row = at[6], part.interleaved = at[7];
    part.mask = (const float*)at[8];
    at += 9;
    for (Field* field : {&part.query, &part.key, &part.value, &part.key_scale, &part.value_scale,
                         &part.value_least, &part.mean}) {
      *field = Field{(const char*)at[0], at[1], at[2], at[3]};
      at += 4;
    }
    call.parts.push_back(part);
  }
  std::vector<Task> tasks;
  int64_t before = 0;
  for (size_t i = 0; i < call.parts.size(); i++) {
    int64_t n = call.parts[i].n;
    for (int64_t from = 0; from < n; from += RUN)
      tasks.push_back(Task{(int64_t)i, from, std::min(n, from + RUN), before});
    before += n;
  }
  int rows = call.rows(), values = padded(call.value_width);
  int64_t pairs = call.batch * call.kv_heads, runs = (int64_t)tasks.size(), keys = call.keys();
  std::vector<Softmax> soft((size_t)(pairs * runs * rows));
  std::vector<float> outs((size_t)(pairs * runs * rows * values)), kept(call.total ? (size_t)(pairs * rows * keys) : 0);
#pragma omp parallel if (pairs * runs > 1)
  {
    Thread thread(call);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * runs; task++) {
      int64_t pair = task / runs;
      const Task& t = tasks[task % runs];
      float* scores = call.total ? kept.data() + pair * rows * keys + t.before : nullptr;
      thread.run(call.parts[t.part], pair / call.kv_heads, pair % call.kv_heads, t.from, t.to,
                 &soft[task * rows], &outs[task * rows * values], scores, keys);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < pairs * rows; row++) {
      int64_t pair = row / rows, r = row % rows;
      int64_t head = pair % call.kv_heads * (call.heads / call.kv_heads) + r / call.queries;
      float top = call.sink ? call.sink[head] * LOG2E : NONE, total = 0;
      for (int64_t i = 0; i < runs; i++) top = std::max(top, soft[(pair * runs + i) * rows + r].top);
      float base = top == NONE ? 0 : top;
      if (call.sink) total += std::exp2(call.sink[head] * LOG2E - base);
      int64_t place = (pair / call.kv_heads * call.heads + head) * call.queries + r % call.queries;
      float* out = call.out + place * call.value_width;
      std::memset(out, 0, sizeof(float) * call.value_width);
      for (int64_t i = 0; i < runs; i++) {
        const Softmax& x = soft[(pair * runs + i) * rows + r];
        float share = x.top == NONE ? (x.total == 0 ? 0 : 1) : std::exp2(x.top - base);
        if (share == 0) continue;
        total += x.total * share;
        const float* from = &outs[((pair * runs + i) * rows + r) * values];
        for (int d = 0; d < call.value_width; d++) out[d] += from[d] * share;
      }
      for (int d = 0; d < call.value_width; d++) out[d] *= total == 0 ? 0 : 1 / total;
      call.lse[place] = total == 0 ? NONE : (base + std::log2(total)) * LN2;
    }
    if (call.total) {
#pragma omp for schedule(static)
      for (int64_t pair = 0; pair < pairs; pair++)
        for (int r = 0; r < rows; r++) {
          int64_t head = pair % call.kv_heads * (call.heads / call.kv_heads) + r / call.queries;
          int64_t place = (pair / call.kv_heads * call.heads + head) * call.queries + r % call.queries;
          float lse = call.lse[place] == NONE ? INFINITY : call.lse[place] * LOG2E;
          const float* from = kept.data() + (pair * rows + r) * keys;
          float* to = call.total + pair * keys;
          int64_t j = 0;
          for (; j + LANES <= keys; j += LANES) store(to + j, load(to + j) + exp2v(load(from + j) - lse));
          for (; j < keys; j++) to[j] += std::exp2(from[j] - lse);
        }
    }
  }
}
