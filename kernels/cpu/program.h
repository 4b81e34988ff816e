// A C function's arguments as data, so that calls can be recorded and made again without Python.
#pragma once

#include <cstdint>
#include <utility>

// One argument; mirrored in program.py.
union Value {
    int64_t integer;  // or an address
    double number;
};

// How a recorded call is made: returns what was wrong, or null.
using PackedFunction = const char* (*)(const Value*);

template <class T>
struct Argument {
    static T of(const Value& value) { return static_cast<T>(value.integer); }
};

template <>
struct Argument<float> {
    static float of(const Value& value) { return static_cast<float>(value.number); }
};

template <class T>
struct Argument<T*> {
    static T* of(const Value& value) { return reinterpret_cast<T*>(value.integer); }
};

template <class... A, std::size_t... I>
const char* call_packed(const char* (*function)(A...), const Value* values,
                        std::index_sequence<I...>) {
    return function(Argument<A>::of(values[I])...);
}

template <class... A>
const char* call_packed(const char* (*function)(A...), const Value* values) {
    return call_packed(function, values, std::index_sequence_for<A...>());
}

// NAME_packed, which takes NAME's arguments as values.
#define EXPORT_PACKED(NAME) \
    extern "C" const char* NAME##_packed(const Value* values) { return call_packed(NAME, values); }
