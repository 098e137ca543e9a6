"""Batches of views: plan which (group, view) a step holds, render and mix groups, load them onto the device.

Must not know about models, teachers or stores.
"""
