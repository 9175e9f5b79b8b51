// The native face of longattn.errors.InvalidInput.
#pragma once

#include <stdexcept>
#include <string>

namespace longattn {

struct InvalidInput : std::runtime_error {
  InvalidInput(std::string argument_, std::string expected_, std::string got_)
      : std::runtime_error(argument_ + ": expected " + expected_ + ", got " + got_),
        argument(std::move(argument_)),
        expected(std::move(expected_)),
        got(std::move(got_)) {}
  std::string argument, expected, got;
};

}  // namespace longattn
