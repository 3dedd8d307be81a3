"""Modules that other people wrote, on their way to an ExportableModel.

module + example inputs → how forward is asked (forward_form) → all tasks behind one forward (all_tasks) →
ONE trace (trace) → changed exactly, columns pulled apart (trace_rewrites) → gates found (gates) → ExportableModel
"""
