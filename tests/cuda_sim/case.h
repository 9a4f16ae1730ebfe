// One simulated call: a folder with `sizes` ("name value" lines) and raw arrays; what the op leaves is written back.
// Arrays are exact heap allocations, so that AddressSanitizer sees one element too many; outputs start as 0xff bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class Case {
public:
    explicit Case(const std::string& folder) : folder_(folder) {
        std::ifstream file(folder + "/sizes");
        for (std::string name; file >> name;) file >> sizes_[name];
    }

    int64_t operator[](const std::string& name) const { return sizes_.at(name); }

    // Null when the case has no such array: an optional argument left out.
    template <class T>
    T* input(const std::string& name) {
        std::ifstream file(folder_ + "/" + name, std::ios::binary);
        if (!file) return nullptr;
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        return static_cast<T*>(keep(name, bytes.size(), bytes.data()));
    }

    template <class T>
    T* output(const std::string& name, int64_t count) {
        return static_cast<T*>(keep(name, count * sizeof(T), nullptr));
    }

    void save() const {
        for (const auto& [name, array] : arrays_) {
            std::ofstream file(folder_ + "/" + name, std::ios::binary);
            file.write(array.data.get(), array.size);
        }
    }

private:
    struct Array {
        std::unique_ptr<char[]> data;
        int64_t size;
    };

    void* keep(const std::string& name, int64_t size, const char* from) {
        Array& array = arrays_[name];
        array = {std::unique_ptr<char[]>(new char[size]), size};
        if (from)
            memcpy(array.data.get(), from, size);
        else
            memset(array.data.get(), 0xff, size);
        return array.data.get();
    }

    std::string folder_;
    std::map<std::string, int64_t> sizes_;
    std::map<std::string, Array> arrays_;
};
