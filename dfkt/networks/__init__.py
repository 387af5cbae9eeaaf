"""Networks: built by name, read at taps, cut off behind them."""
