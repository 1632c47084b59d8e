# SPDX-License-Identifier: Apache-2.0
"""Integration with transformers' Trainer: the two names, their options and the callback. Imports nothing by itself."""
