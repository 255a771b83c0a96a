"""Analysis of finished cells: learning curves, leverage ratios, emergence of single items."""
