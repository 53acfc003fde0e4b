// How an operator is registered for a backend: prepare_<op>() checks, parses and allocates alike for all of them, and
// the backend fills in the outputs.
#pragma once

namespace group_sampling {

// `prepare` takes the operator's arguments and returns its call, a struct with the outputs in `out`; `run` takes the
// call. Kernel<prepare, run>::call has the operator's schema.
template <auto prepare, auto run>
struct Kernel;

template <typename Call, typename... Args, Call (*prepare)(Args...), void (*run)(const Call&)>
struct Kernel<prepare, run> {
  static auto call(Args... args) {
    const Call prepared = prepare(args...);
    run(prepared);
    return prepared.out;
  }
};

}  // namespace group_sampling
