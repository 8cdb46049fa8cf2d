// The native ops of any backend: schemas, checks, views, outputs, and the steps that they ask for.
//
// Every op takes lists; one tensor is a list of one. None is differentiable and none returns an
// alias; those whose names end in an underscore write their tensors in place. `batches` is empty,
// or has for each tensor a dim and how many matrices are side by side along it, each with channels
// and a ranking of its own; norms, counts and flags are then those of all matrices, one after
// another. A backend has
//   device_type()                           of its tensors, as aoti_torch_device_type_*()
//   Call(int32_t device, const Steps&)      takes the memory that the steps need there; run()
//   Scratch(int32_t device, size_t bytes)   memory of one call there; data()
//   prepare_output(void*, size_t)           called before the first write to a large output
//   first_unwritable(blocks, count)         the place of one that cannot be written, or `count`
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

// The check of torch's C functions, by its name in this torch or in 2.11's.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define LNPRUNE_CHECK_CODE(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define LNPRUNE_CHECK_CODE(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace lnprune {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

template <class Library>
void define_ops(Library& library) {
  library.def("channel_norms(Tensor[] tensors, int[] dims, float p, int[] batches=[]) -> Tensor[]");
  library.def("channel_sums(Tensor[] tensors, int[] dims, float p, int[] batches=[]) -> Tensor[]");
  library.def(
      "scaled_norms(Tensor[] tensors, int[] dims, Tensor[] factors, int[] factor_dims, float p,"
      " bool rooted=True, int[] batches=[]) -> Tensor[]");
  library.def("norms_of_sums(Tensor[] sums, float p) -> Tensor[]");
  library.def(
      "select_channels(Tensor[] norms, Tensor[] mask_counts, int[] counts, float[] fractions,"
      " int[] rankings=[]) -> Tensor[]");
  library.def(
      "write_masks(Tensor[] keep, Tensor[] scores, Tensor[] masks, Tensor[] originals, int[] dims,"
      " int[] batches=[]) -> (Tensor[], Tensor[])");
  library.def(
      "prune_channels(Tensor[] scores, Tensor[] masks, Tensor[] originals, int[] dims, float p,"
      " int[] counts, float[] fractions, int[] batches=[]) -> (Tensor[], Tensor[])");
  library.def(
      "zero_channels_(Tensor(a!)[] tensors, Tensor[] keep, int[] dims, int[] batches=[]) -> ()");
  library.def(
      "prune_channels_(Tensor[] scores, Tensor(a!)[] weights, int[] dims, float p, int[] counts,"
      " float[] fractions, int[] batches=[]) -> ()");
}

using StepsByDevice = std::map<int32_t, Steps>;

// Runs the steps of all devices. Memory is taken on all of them before the first one writes: where
// there is none, no tensor has changed.
template <class Call>
void run_calls(const StepsByDevice& steps) {
  std::vector<Call> calls;
  calls.reserve(steps.size());
  for (const auto& [device, here] : steps) calls.emplace_back(device, here);
  for (Call& call : calls) call.run();
}

template <class Backend>
class Ops {
 public:
  static Tensors channel_norms(Tensors tensors, Integers dims, double p, Integers batches) {
    return ranked(tensors, {dims, batches}, p, true);
  }

  static Tensors channel_sums(Tensors tensors, Integers dims, double p, Integers batches) {
    return ranked(tensors, {dims, batches}, p, false);
  }

  // Norms, or sums before the root, of tensors whose elements are multiplied by a factor for each
  // index of another dim: float64, as many as that dim has, or as many for each matrix.
  static Tensors scaled_norms(Tensors tensors, Integers dims, Tensors factors, Integers factor_dims,
                              double p, bool rooted, Integers batches) {
    STD_TORCH_CHECK(factors.size() == tensors.size() && factor_dims.size() == tensors.size(),
                    "lnprune: expected factors and their dim for each of ", tensors.size(),
                    " tensors, got ", factors.size(), " and ", factor_dims.size());
    const Along along{dims, batches};
    const std::vector<View> views = views_along(tensors, along);
    const NormOrder order = checked_order(p);
    Tensors results;
    StepsByDevice steps;
    for (size_t i = 0; i < views.size(); ++i) {
      const View& view = views[i];
      results.push_back(
          new_vector(view.slices.all_channels(), aoti_torch_dtype_float64(), view.device));
      Steps& here = steps[view.device];
      here.order = order;
      here.rooted = rooted;
      here.scores.push_back(
          {view.tensor.const_data_ptr(), view.type, view.slices,
           static_cast<double*>(results.back().mutable_data_ptr()),
           scaling_of(view, dims[i], along.batch(i), factors[i], factor_dims[i])});
    }
    run(steps);
    return results;
  }

  static Tensors norms_of_sums(Tensors sums, double p) {
    const NormOrder order = checked_order(p);
    Tensors norms;
    norms.reserve(sums.size());
    StepsByDevice steps;
    for (const Tensor& tensor : sums) {
      const double* values = doubles_of(tensor, "sums");
      const int64_t channels = tensor.numel();
      const int32_t device = device_of(tensor);
      norms.push_back(new_vector(channels, aoti_torch_dtype_float64(), device));
      if (channels == 0) continue;
      Steps& here = steps[device];
      here.order = order;
      here.sums.push_back(
          {values, channels, static_cast<double*>(norms.back().mutable_data_ptr())});
    }
    run(steps);
    return norms;
  }

  // Each tensor holds so many rankings of equal length as `rankings` says, or one where that is
  // empty. Counts and fractions are those of all rankings, one after another.
  static Tensors select_channels(Tensors norms, Tensors mask_counts, Integers counts,
                                 std::vector<double> fractions, Integers rankings) {
    STD_TORCH_CHECK(rankings.empty() || rankings.size() == norms.size(),
                    "lnprune: expected no numbers of rankings or one per tensor, got ",
                    rankings.size());
    const size_t all = rankings.empty()
                           ? norms.size()
                           : std::accumulate(rankings.begin(), rankings.end(), size_t{0});
    check_amounts(all, counts, fractions);
    STD_TORCH_CHECK(mask_counts.empty() || mask_counts.size() == norms.size(),
                    "lnprune: expected no mask counts or one per tensor, got ", mask_counts.size());
    Tensors keep;
    StepsByDevice steps;
    size_t ranking = 0;
    for (size_t i = 0; i < norms.size(); ++i) {
      const double* values = doubles_of(norms[i], "norms");
      const double* mask_values =
          mask_counts.empty() ? nullptr : doubles_of(mask_counts[i], "norms");
      const int64_t channels = norms[i].numel();
      const int32_t device = device_of(norms[i]);
      STD_TORCH_CHECK(mask_counts.empty() || mask_counts[i].numel() == channels,
                      "lnprune: expected a mask count for each of ", channels, " channels");
      if (!mask_counts.empty()) check_device(mask_counts[i], device, "mask counts");
      keep.push_back(new_vector(channels, aoti_torch_dtype_bool(), device));
      const int64_t here = rankings.empty() ? 1 : rankings[i];
      STD_TORCH_CHECK(here > 0 && channels % here == 0,
                      "lnprune: expected rankings of equal length, ", here, " of them, got ",
                      channels, " norms");
      const SelectItem item{values,
                            mask_values,
                            here,
                            channels / here,
                            0,
                            0,
                            static_cast<bool*>(keep.back().mutable_data_ptr())};
      add_selections(steps[device].selections, item, &counts[ranking], &fractions[ranking]);
      ranking += here;
    }
    run(steps);
    return keep;
  }

  static std::tuple<Tensors, Tensors> write_masks(Tensors keep, Tensors scores, Tensors masks,
                                                  Tensors originals, Integers dims,
                                                  Integers batches) {
    const Along along{dims, batches};
    const std::vector<View> views = views_along(scores, along);
    const std::vector<const bool*> flags = checked_flags(keep, views);
    Writing writing(views, masks, originals, along);
    StepsByDevice steps;
    for (size_t i = 0; i < views.size(); ++i) {
      steps[views[i].device].writes.push_back(writing.item(i, flags[i]));
    }
    run(steps);
    return {std::move(writing.new_masks), std::move(writing.weights)};
  }

  static std::tuple<Tensors, Tensors> prune_channels(Tensors scores, Tensors masks,
                                                     Tensors originals, Integers dims, double p,
                                                     Integers counts, std::vector<double> fractions,
                                                     Integers batches) {
    check_amounts(scores.size(), counts, fractions);
    const Along along{dims, batches};
    const std::vector<View> views = views_along(scores, along);
    const NormOrder order = checked_order(p);
    Writing writing(views, masks, originals, along);

    Choice choice(views, writing.mask_views, order, counts, fractions);
    for (size_t i = 0; i < views.size(); ++i) {
      choice.steps[views[i].device].writes.push_back(writing.item(i, choice.keep[i]));
    }
    run(choice.steps);
    return {std::move(writing.new_masks), std::move(writing.weights)};
  }

  static void zero_channels_(Tensors tensors, Tensors keep, Integers dims, Integers batches) {
    const std::vector<View> views = writable_views_along(tensors, {dims, batches});
    const std::vector<const bool*> flags = checked_flags(keep, views);
    StepsByDevice steps;
    for (size_t i = 0; i < views.size(); ++i) {
      steps[views[i].device].zeros.push_back(zero_item(views[i], flags[i]));
    }
    run(steps);
  }

  static void prune_channels_(Tensors scores, Tensors weights, Integers dims, double p,
                              Integers counts, std::vector<double> fractions, Integers batches) {
    check_amounts(scores.size(), counts, fractions);
    const Along along{dims, batches};
    const std::vector<View> views = views_along(scores, along);
    const std::vector<View> targets = writable_views_along(weights, along);
    for (size_t i = 0; i < targets.size(); ++i) {
      STD_TORCH_CHECK(same_values(scores[i].sizes(), weights[i].sizes()),
                      "lnprune: expected a weight of the shape of its scores");
      check_device(targets[i].tensor, views[i].device, "the weight");
    }
    Choice choice(views, {}, checked_order(p), counts, fractions);
    for (size_t i = 0; i < targets.size(); ++i) {
      choice.steps[targets[i].device].zeros.push_back(zero_item(targets[i], choice.keep[i]));
    }
    run(choice.steps);
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;

  // Where the channels of each tensor are.
  struct Along {
    const Integers& dims;
    const Integers& batches;

    void check(size_t tensors) const {
      STD_TORCH_CHECK(dims.size() == tensors, "lnprune: expected one dim per tensor, got ",
                      dims.size(), " for ", tensors);
      STD_TORCH_CHECK(batches.empty() || batches.size() == 2 * tensors,
                      "lnprune: expected no batches or a dim and a count per tensor, got ",
                      batches.size(), " numbers for ", tensors);
    }
    Batch batch(size_t i) const {
      return batches.empty() ? Batch{0, 1} : Batch{batches[2 * i], batches[2 * i + 1]};
    }
  };

  // One number per channel: the norms, or the sums before the root.
  static Tensors ranked(const Tensors& tensors, const Along& along, double p, bool rooted) {
    const std::vector<View> views = views_along(tensors, along);
    const NormOrder order = checked_order(p);
    Tensors results;
    results.reserve(views.size());
    StepsByDevice steps;
    for (const View& view : views) {
      results.push_back(
          new_vector(view.slices.all_channels(), aoti_torch_dtype_float64(), view.device));
      Steps& here = steps[view.device];
      here.order = order;
      here.rooted = rooted;
      here.scores.push_back({view.tensor.const_data_ptr(), view.type, view.slices,
                             static_cast<double*>(results.back().mutable_data_ptr())});
    }
    run(steps);
    return results;
  }

  // A tensor seen along one dim. Where its elements are not one dense block, `tensor` is a dense
  // copy.
  struct View {
    Tensor tensor;
    ElementType type;
    Slices slices;
    int32_t device;
    int64_t rankings;  // each of as many channels
  };

  static Scaling scaling_of(const View& view, int64_t dim, Batch batch, const Tensor& factors,
                            int64_t factor_dim) {
    const auto sizes = view.tensor.sizes();
    const int64_t dims = static_cast<int64_t>(sizes.size());
    if (dim < 0) dim += dims;
    if (batch.dim < 0) batch.dim += dims;
    STD_TORCH_CHECK(
        factor_dim >= 0 && factor_dim < dims && factor_dim != dim,
        "lnprune: expected a dim of the factors from 0 on that is not the channels', got ",
        factor_dim);
    const DimInView place =
        place_of_dim(sizes.data(), view.tensor.strides().data(), dims, dim, batch, factor_dim);
    const double* values = doubles_of(factors, "factors");
    check_device(factors, view.device, "factors");
    const int64_t count = factors.numel();
    const bool is_apart = count != place.length;
    STD_TORCH_CHECK(!is_apart || count == batch.size * place.length, "lnprune: expected ",
                    place.length, " factors, or as many for each matrix, got ", count);
    STD_TORCH_CHECK(
        !is_apart || view.slices.batch == batch.size,
        "lnprune: expected a batch outside of all other dims for factors of each matrix");
    return {values, place, is_apart ? place.length : 0};
  }

  // The scratch memory of one device: the norms of all channels, where masks are counted their
  // counts, and their keep flags. Handed out tensor by tensor.
  class Room {
   public:
    struct Place {
      double* norms;
      double* mask_counts;
      bool* keep;
    };

    Room(int32_t device, int64_t channels, bool with_counts)
        : channels_(channels),
          columns_(with_counts ? 2 : 1),
          scratch_(device, channels * (columns_ * sizeof(double) + sizeof(bool))) {}

    Place take(int64_t channels) {
      double* norms = static_cast<double*>(scratch_.data());
      double* mask_counts = columns_ == 2 ? norms + channels_ + taken_ : nullptr;
      bool* keep = reinterpret_cast<bool*>(norms + columns_ * channels_) + taken_;
      const Place place{norms + taken_, mask_counts, keep};
      taken_ += channels;
      return place;
    }

   private:
    int64_t channels_;
    int64_t columns_;  // of float64
    int64_t taken_ = 0;
    typename Backend::Scratch scratch_;
  };

  // What the write step reads and makes, for a list of tensors. Masks and originals are one per
  // tensor or none: no masks stand for masks of ones, and without originals no weights are made.
  struct Writing {
    std::vector<View> mask_views;
    const std::vector<View>& layouts;  // of the new masks: the masks, or where none, the scores
    const Tensors& originals;
    Tensors new_masks;
    Tensors weights;

    Writing(const std::vector<View>& views, const Tensors& masks, const Tensors& originals,
            const Along& along)
        : mask_views(view_masks(masks, views, along)),
          layouts(masks.empty() ? views : mask_views),
          originals(originals) {
      const size_t count = layouts.size();
      STD_TORCH_CHECK(originals.empty() || originals.size() == count,
                      "lnprune: expected no originals or one per tensor, got ", originals.size());
      new_masks.reserve(count);
      weights.reserve(originals.size());
      for (const View& layout : layouts) new_masks.push_back(new_like(layout));
      for (size_t i = 0; i < originals.size(); ++i) {
        STD_TORCH_CHECK(
            same_layout(new_masks[i], originals[i]),
            "lnprune: expected an original of the shape, strides and dtype of its new mask");
        check_device(originals[i], layouts[i].device, "the original");
        weights.push_back(new_like(layouts[i]));
      }
    }

    WriteItem item(size_t i, const bool* keep) const {
      const bool with_weight = !originals.empty();
      return {keep,
              mask_views.empty() ? nullptr : mask_views[i].tensor.const_data_ptr(),
              with_weight ? originals[i].const_data_ptr() : nullptr,
              new_masks[i].mutable_data_ptr(),
              with_weight ? weights[i].mutable_data_ptr() : nullptr,
              layouts[i].type,
              layouts[i].slices};
    }
  };

  // The rank and select steps of a call, and where their keep flags will be.
  struct Choice {
    std::map<int32_t, Room> rooms;
    StepsByDevice steps;
    std::vector<const bool*> keep;

    Choice(const std::vector<View>& views, const std::vector<View>& mask_views, NormOrder order,
           const Integers& counts, const std::vector<double>& fractions) {
      std::map<int32_t, int64_t> channels;
      for (const View& view : views) channels[view.device] += view.slices.all_channels();
      for (const auto& [device, count] : channels) {
        rooms.try_emplace(device, device, count, !mask_views.empty());
      }
      for (size_t i = 0; i < views.size(); ++i) {
        const auto& [tensor, type, slices, device, rankings] = views[i];
        const int64_t all = slices.all_channels();
        const auto place = rooms.at(device).take(all);
        Steps& here = steps[device];
        here.order = order;
        here.scores.push_back({tensor.const_data_ptr(), type, slices, place.norms});
        if (!mask_views.empty()) {
          const View& mask = mask_views[i];
          here.masks.push_back(
              {mask.tensor.const_data_ptr(), mask.type, mask.slices, place.mask_counts});
        }
        here.selections.push_back({place.norms, place.mask_counts, rankings, all / rankings,
                                   counts[i], fractions[i], place.keep});
        keep.push_back(place.keep);
      }
    }
  };

  // The rankings of an item, those with the same amount that follow one another as one.
  static void add_selections(std::vector<SelectItem>& selections, const SelectItem& item,
                             const int64_t* counts, const double* fractions) {
    for (int64_t first = 0; first < item.rankings;) {
      int64_t end = first + 1;
      while (end < item.rankings && counts[end] == counts[first] &&
             fractions[end] == fractions[first]) {
        ++end;
      }
      SelectItem part = ranking_of(item, first);
      part.rankings = end - first;
      part.count = counts[first];
      part.fraction = fractions[first];
      selections.push_back(part);
      first = end;
    }
  }

  static ZeroItem zero_item(const View& view, const bool* keep) {
    return {keep, view.tensor.mutable_data_ptr(), view.type, view.slices};
  }

  static std::vector<const bool*> checked_flags(const Tensors& keep,
                                                const std::vector<View>& views) {
    STD_TORCH_CHECK(keep.size() == views.size(), "lnprune: expected keep flags for each of ",
                    views.size(), " tensors, got ", keep.size());
    std::vector<const bool*> flags;
    for (size_t i = 0; i < keep.size(); ++i) {
      STD_TORCH_CHECK(
          keep[i].scalar_type() == ScalarType::Bool && keep[i].dim() == 1 &&
              keep[i].is_contiguous() && keep[i].numel() == views[i].slices.all_channels(),
          "lnprune: expected ", views[i].slices.all_channels(), " contiguous bool keep flags, got ",
          keep[i].numel(), " of ", torch::headeronly::toString(keep[i].scalar_type()));
      check_device(keep[i], views[i].device, "keep flags");
      flags.push_back(static_cast<const bool*>(keep[i].const_data_ptr()));
    }
    return flags;
  }

  static void run(const StepsByDevice& steps) { run_calls<typename Backend::Call>(steps); }

  static ElementType element_type(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Double: return ElementType::float64;
      case ScalarType::Float: return ElementType::float32;
      case ScalarType::Half: return ElementType::float16;
      case ScalarType::BFloat16: return ElementType::bfloat16;
      case ScalarType::Float8_e4m3fn: return ElementType::float8_e4m3fn;
      case ScalarType::Float8_e4m3fnuz: return ElementType::float8_e4m3fnuz;
      case ScalarType::Float8_e5m2: return ElementType::float8_e5m2;
      case ScalarType::Float8_e5m2fnuz: return ElementType::float8_e5m2fnuz;
      default:
        STD_TORCH_CHECK(false, "lnprune: expected a real floating-point dtype, got ",
                        torch::headeronly::toString(tensor.scalar_type()));
    }
  }

  // The index of the tensor's device, which is of the backend's type.
  static int32_t device_of(const Tensor& tensor) {
    int32_t type = 0;
    int32_t index = 0;
    LNPRUNE_CHECK_CODE(aoti_torch_get_device_type(tensor.get(), &type));
    LNPRUNE_CHECK_CODE(aoti_torch_get_device_index(tensor.get(), &index));
    STD_TORCH_CHECK(type == Backend::device_type(),
                    "lnprune: expected all tensors of a call on devices of one type");
    return index;
  }

  static void check_device(const Tensor& tensor, int32_t device, const char* what) {
    const int32_t found = device_of(tensor);
    STD_TORCH_CHECK(found == device, "lnprune: expected ", what,
                    " on the device of the scores, index ", device, ", got index ", found);
  }

  // An uninitialised tensor.
  static Tensor new_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides,
                           int32_t dtype, int32_t device) {
    AtenTensorHandle handle = nullptr;
    LNPRUNE_CHECK_CODE(aoti_torch_empty_strided(dims, sizes, strides, dtype, Backend::device_type(),
                                                device, &handle));
    return Tensor(handle);
  }

  static Tensor new_vector(int64_t length, int32_t dtype, int32_t device) {
    const int64_t stride = 1;
    return new_tensor(1, &length, &stride, dtype, device);
  }

  // A dense output.
  static Tensor new_like(const View& view) {
    constexpr int64_t kLarge = int64_t{4} << 20;
    int32_t dtype = 0;
    LNPRUNE_CHECK_CODE(aoti_torch_get_dtype(view.tensor.get(), &dtype));
    const auto sizes = view.tensor.sizes();
    Tensor tensor = new_tensor(static_cast<int64_t>(sizes.size()), sizes.data(),
                               view.tensor.strides().data(), dtype, view.device);
    const int64_t bytes = view.slices.elements() * static_cast<int64_t>(view.tensor.element_size());
    if (bytes >= kLarge) Backend::prepare_output(tensor.mutable_data_ptr(), bytes);
    return tensor;
  }

  static View view_along(Tensor tensor, int64_t dim, Batch batch, bool in_place = false) {
    const auto sizes = tensor.sizes();
    const int64_t dims = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(dim >= -dims && dim < dims, "lnprune: expected a dim in [", -dims, ", ", dims,
                    "), got ", dim);
    STD_TORCH_CHECK(batch.dim >= -dims && batch.dim < dims, "lnprune: expected a batch dim in [",
                    -dims, ", ", dims, "), got ", batch.dim);
    if (dim < 0) dim += dims;
    if (batch.dim < 0) batch.dim += dims;
    STD_TORCH_CHECK(batch.size > 0 && sizes[batch.dim] % batch.size == 0,
                    "lnprune: expected a batch that divides the ", sizes[batch.dim],
                    " indices of its dim, got ", batch.size);
    const ElementType type = element_type(tensor);
    const int32_t device = device_of(tensor);
    if (!is_dense(sizes.data(), tensor.strides().data(), dims)) {
      STD_TORCH_CHECK(!in_place,
                      "lnprune: expected a tensor without gaps or overlaps to write in place");
      tensor = torch::stable::clone(tensor);
    }
    STD_TORCH_CHECK(tensor.numel() > 0, "lnprune: expected a tensor with elements, got none");
    const Slices slices =
        make_slices(tensor.sizes().data(), tensor.strides().data(), dims, dim, batch);
    STD_TORCH_CHECK(slices.batch > 0,
                    "lnprune: expected the batch outside of all other dims in memory");
    return {std::move(tensor), type, slices, device, batch.size};
  }

  static std::vector<View> views_along(const Tensors& tensors, const Along& along,
                                       bool in_place = false) {
    along.check(tensors.size());
    std::vector<View> views;
    views.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      views.push_back(view_along(tensors[i], along.dims[i], along.batch(i), in_place));
    }
    return views;
  }

  // Views of tensors that are written in place. A copy-on-write tensor, which shares its memory
  // until it is written, gets memory of its own here. So no pointer may be taken before this call.
  static std::vector<View> writable_views_along(const Tensors& tensors, const Along& along) {
    std::vector<View> views = views_along(tensors, along, true);
    std::vector<void*> blocks;
    blocks.reserve(views.size());
    for (const View& view : views) blocks.push_back(view.tensor.mutable_data_ptr());
    const size_t unwritable = Backend::first_unwritable(blocks.data(), blocks.size());
    STD_TORCH_CHECK(
        unwritable == blocks.size(),
        "lnprune: expected memory that can be written, got a read-only mapping as tensor ",
        unwritable, " of ", blocks.size());
    return views;
  }

  static std::vector<View> view_masks(const Tensors& masks, const std::vector<View>& scores,
                                      const Along& along) {
    STD_TORCH_CHECK(masks.empty() || masks.size() == scores.size(),
                    "lnprune: expected no masks or one per tensor, got ", masks.size());
    std::vector<View> views;
    views.reserve(masks.size());
    for (size_t i = 0; i < masks.size(); ++i) {
      STD_TORCH_CHECK(masks[i].scalar_type() == scores[i].tensor.scalar_type() &&
                          same_values(masks[i].sizes(), scores[i].tensor.sizes()),
                      "lnprune: expected a mask of the shape and dtype of the scores");
      check_device(masks[i], scores[i].device, "the mask");
      // A repeated mask is contiguous whatever the layout of the one before.
      views.push_back(
          view_along(torch::stable::contiguous(masks[i]), along.dims[i], along.batch(i)));
    }
    return views;
  }

  template <class Array>
  static bool same_values(const Array& a, const Array& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

  static bool same_layout(const Tensor& a, const Tensor& b) {
    return a.scalar_type() == b.scalar_type() && same_values(a.sizes(), b.sizes()) &&
           same_values(a.strides(), b.strides());
  }

  static NormOrder checked_order(double p) {
    STD_TORCH_CHECK(p == p, "lnprune: expected a norm of a real order, got NaN");
    return norm_order(p);
  }

  static void check_amounts(size_t tensors, const Integers& counts,
                            const std::vector<double>& fractions) {
    STD_TORCH_CHECK(counts.size() == tensors && fractions.size() == tensors,
                    "lnprune: expected one count and one fraction per tensor, got ", counts.size(),
                    " and ", fractions.size(), " for ", tensors);
    for (double fraction : fractions) {
      STD_TORCH_CHECK(fraction >= 0 && fraction <= 1, "lnprune: expected fractions in [0, 1], got ",
                      fraction);
    }
  }

  static const double* doubles_of(const Tensor& tensor, const char* what) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 && tensor.is_contiguous(),
        "lnprune: expected contiguous float64 ", what, " with one dim, got ",
        torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.dim(), " dims",
        tensor.is_contiguous() ? "" : ", not contiguous");
    return static_cast<const double*>(tensor.const_data_ptr());
  }
};

// Registers a backend's kernels, each boxed by the macro of the stable ABI.
#define LNPRUNE_IMPLEMENT_OPS(library, Backend)                                        \
  library.impl("channel_norms", TORCH_BOX(&lnprune::Ops<Backend>::channel_norms));     \
  library.impl("channel_sums", TORCH_BOX(&lnprune::Ops<Backend>::channel_sums));       \
  library.impl("scaled_norms", TORCH_BOX(&lnprune::Ops<Backend>::scaled_norms));       \
  library.impl("norms_of_sums", TORCH_BOX(&lnprune::Ops<Backend>::norms_of_sums));     \
  library.impl("select_channels", TORCH_BOX(&lnprune::Ops<Backend>::select_channels)); \
  library.impl("write_masks", TORCH_BOX(&lnprune::Ops<Backend>::write_masks));         \
  library.impl("prune_channels", TORCH_BOX(&lnprune::Ops<Backend>::prune_channels));   \
  library.impl("zero_channels_", TORCH_BOX(&lnprune::Ops<Backend>::zero_channels_));   \
  library.impl("prune_channels_", TORCH_BOX(&lnprune::Ops<Backend>::prune_channels_))

}  // namespace lnprune
