//! The library behind `fermatad`, `fermata-shim` and `fermata-plugin-host`.
//!
//! The rooms are listed in the order in which they may import each other: downward only. The
//! blank lines keep rustfmt from sorting them; the tidy test checks the imports.
#![deny(unsafe_code)]

pub mod store;

pub mod history;

pub mod plugins;

pub mod shim;

pub mod failpoint;

#[allow(unsafe_code)]
pub mod os;
