// Moves the bytes of a step of Adamax and computes nothing. A step that reads w, m, u and g
// from memory once and writes w, m and u once can be no faster.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kPiece = 32 * 1024;  // elements
constexpr int64_t kRows = 256;         // rows in a piece
constexpr int64_t kAhead = 8;          // rows
constexpr int64_t kLine = 16;          // elements in a cache line

void move(float* __restrict w, float* __restrict m, float* __restrict u,
    const float* __restrict g, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        u[i] = m[i];
        m[i] = w[i];
        w[i] = g[i];
    }
}

// Calls `body(piece)` for each piece of [0, pieces), in `threads` threads.
template <class Body>
void in_parallel(int threads, int64_t pieces, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) body(piece);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

// Arrays of `length` elements, at w[0], w[1], ...
extern "C" void move_arrays(float* const* w, float* const* m, float* const* u,
    const float* const* g, int64_t arrays, int64_t length, int threads) {
    const int64_t pieces = (length + kPiece - 1) / kPiece;
    in_parallel(threads, arrays * pieces, [&](int64_t piece) {
        const int64_t array = piece / pieces, start = piece % pieces * kPiece;
        move(w[array] + start, m[array] + start, u[array] + start, g[array] + start,
            std::min(kPiece, length - start));
    });
}

// The rows of three tables that `ids` names, each once.
extern "C" void move_rows(float* w, float* m, float* u, const float* g, const int64_t* ids,
    int64_t count, int64_t width, int threads) {
    in_parallel(threads, (count + kRows - 1) / kRows, [&](int64_t piece) {
        const int64_t stop = std::min((piece + 1) * kRows, count);
        for (int64_t i = piece * kRows; i < stop; ++i) {
            const int64_t ahead = ids[std::min(i + kAhead, stop - 1)] * width;
            for (int64_t j = 0; j < width; j += kLine) {
                for (float* table : {w, m, u}) __builtin_prefetch(table + ahead + j, 1);
            }
            const int64_t row = ids[i] * width;
            move(w + row, m + row, u + row, g + i * width, width);
        }
    });
}
