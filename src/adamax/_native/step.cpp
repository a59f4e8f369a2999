#include "step.hpp"

namespace adamax {
namespace {

// Numbers the pieces of work of several things one after the other.
class Pieces {
  public:
    void reserve(size_t count) { first_.reserve(count + 1); }
    void add(int64_t pieces) { first_.push_back(first_.back() + pieces); }
    int64_t count() const { return first_.back(); }
    size_t owner(int64_t piece) const {
        return size_t(
                   std::upper_bound(first_.begin(), first_.end(), piece) - first_.begin()) -
               1;
    }
    int64_t first(size_t owner) const { return first_[owner]; }

  private:
    std::vector<int64_t> first_{0};
};

}  // namespace

void Step::run() {
    clip();
    if (in_turn) {
        for (size_t i = 0; i < parameters.size(); ++i) update(i, i + 1, 0, 0);
        for (size_t i = 0; i < tables.size(); ++i) update(0, 0, i, i + 1);
    } else {
        update(0, parameters.size(), 0, tables.size());
    }
    for (const Table& table : tables) {
        if (!table.exact) continue;
        table.catch_up_in_turn();
        table.recorded.commit(table.history);
    }
    for (const Parameter& parameter : parameters) parameter.advance();
    for (const Counter& counter : counters) counter.advance();
}

// Small parameters share pieces, large ones are several: a piece is some elements of all
// parameters one after the other.
void Step::update(size_t first, size_t last, size_t first_table, size_t last_table) {
    Pieces elements, keys;
    elements.reserve(last - first);
    for (size_t i = first; i < last; ++i) elements.add(parameters[i].length());
    int64_t work = elements.count();
    for (size_t i = first_table; i < last_table; ++i) {
        keys.add(tables[i].pieces());
        work += 2 * tables[i].elements();
    }
    const int64_t dense = (elements.count() + kDensePiece - 1) / kDensePiece;
    parallel_for(worth(threads, work), dense + keys.count(), [&](int64_t piece) {
        if (piece >= dense) {
            const size_t owner = keys.owner(piece - dense);
            tables[first_table + owner].update(piece - dense - keys.first(owner));
            return;
        }
        const int64_t start = piece * kDensePiece;
        const int64_t stop = std::min(start + kDensePiece, elements.count());
        for (size_t i = elements.owner(start); elements.first(i) < stop; ++i) {
            const Parameter& parameter = parameters[first + i];
            const int64_t before = elements.first(i);
            parameter.update(std::max<int64_t>(start - before, 0),
                std::min(stop - before, parameter.length()));
            if (i + 1 == last - first) break;
        }
    });
}

// Multiplies the scale of each gradient by what brings norms down to their limits.
void Step::clip() {
    if (!clips()) return;
    const std::vector<Norm> norms = norms_of(gradients, threads);
    Norm all;
    for (const Norm& norm : norms) all.add(norm);
    const bool together = std::isfinite(global_clipnorm);
    const double limit = std::min(clipnorm, global_clipnorm);
    for (size_t i = 0; i < norms.size(); ++i) {
        const size_t dense = parameters.size();
        auto& scalars = i < dense ? parameters[i].scalars : tables[i - dense].scalars;
        scalars.scale *= (together ? all : norms[i]).clip_factor(limit);
    }
}

std::vector<Norm> norms_of(const std::vector<Gradient>& gradients, int threads) {
    Pieces pieces;
    int64_t work = 0;
    for (const Gradient& gradient : gradients) {
        pieces.add(gradient.pieces());
        work += gradient.length();
    }
    std::vector<Norm> of_pieces(static_cast<size_t>(pieces.count()));
    parallel_for(worth(threads, work), pieces.count(), [&](int64_t piece) {
        const size_t owner = pieces.owner(piece);
        of_pieces[size_t(piece)] = gradients[owner].norm(piece - pieces.first(owner));
    });
    std::vector<Norm> norms(gradients.size());
    for (size_t i = 0; i < gradients.size(); ++i) {
        for (int64_t piece = pieces.first(i); piece < pieces.first(i + 1); ++piece) {
            norms[i].add(of_pieces[size_t(piece)]);
        }
    }
    return norms;
}

}  // namespace adamax
