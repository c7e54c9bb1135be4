//! The failpoints of a build that has them. The list in the environment is parsed once. Passing an armed failpoint
//! kills, fails or stops the process at the chosen passage, or appends each passage to a file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, raise};

/// The environment variable that names the file of failpoint events.
const EVENTS: &str = "FERMATA_FAILPOINT_EVENTS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FailpointEffect {
    Abort,
    Error,
    Stop,
    Tell,
}

#[derive(Debug)]
struct Armed {
    name: String,
    passage: u64,
    effect: FailpointEffect,
    passed: AtomicU64,
}

static ARMED: OnceLock<Vec<Armed>> = OnceLock::new();

fn armed(variable: &str) -> &'static [Armed] {
    ARMED.get_or_init(|| parse(&std::env::var(variable).unwrap_or_default()))
}

fn parse(value: &str) -> Vec<Armed> {
    let one = |text: &str| {
        let (place, effect) = text.split_once('=')?;
        let effect = match effect.trim() {
            "abort" => FailpointEffect::Abort,
            "error" => FailpointEffect::Error,
            "stop" => FailpointEffect::Stop,
            "tell" => FailpointEffect::Tell,
            _ => return None,
        };
        let (name, passage) = match place.split_once('@') {
            Some((name, passage)) => (name, passage.trim().parse().ok()?),
            None => (place, 1),
        };
        Some(Armed { name: name.trim().to_owned(), passage, effect, passed: AtomicU64::new(0) })
    };
    value.split(',').filter_map(one).collect()
}

fn effect_of(armed: &[Armed], name: &str) -> Option<FailpointEffect> {
    let point = armed.iter().find(|point| point.name == name)?;
    let passage = point.passed.fetch_add(1, Ordering::Relaxed) + 1;
    (passage == point.passage || point.effect == FailpointEffect::Tell).then_some(point.effect)
}

pub fn hit(variable: &str, name: &str) {
    match effect_of(armed(variable), name) {
        Some(FailpointEffect::Abort) => abort(),
        Some(FailpointEffect::Stop) => stop(),
        Some(FailpointEffect::Tell) => tell(name),
        Some(FailpointEffect::Error) | None => {}
    }
}

pub fn check(variable: &str, name: &str) -> io::Result<()> {
    match effect_of(armed(variable), name) {
        Some(FailpointEffect::Abort) => abort(),
        Some(FailpointEffect::Error) => Err(io::Error::other(format!("failpoint {name}"))),
        Some(FailpointEffect::Stop) => {
            stop();
            Ok(())
        }
        Some(FailpointEffect::Tell) => {
            tell(name);
            Ok(())
        }
        None => Ok(()),
    }
}

fn stop() {
    // SIGSTOP cannot be blocked. `raise` returns after a SIGCONT.
    let _refused = raise(Signal::SIGSTOP);
}

fn tell(name: &str) {
    let written = std::env::var_os(EVENTS).map(|path| {
        // A single write, so that the lines of several threads and processes do not mix.
        OpenOptions::new().append(true).create(true).open(path)?.write_all(format!("{name}\n").as_bytes())
    });
    if !matches!(written, Some(Ok(()))) {
        eprintln!("failpoint {name}: failed to write the passage to the file in {EVENTS}: {written:?}");
    }
}

fn abort() -> ! {
    // SIGKILL cannot be caught, so nothing is cleaned up. `abort` is reached only if raising it failed.
    let _refused = raise(Signal::SIGKILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tell_has_an_effect_at_every_passage() {
        let armed = parse("a=tell");
        let effects: Vec<_> = (0..3).map(|_| effect_of(&armed, "a")).collect();
        assert_eq!(effects, [Some(FailpointEffect::Tell); 3]);
    }

    #[test]
    fn a_list_is_parsed_and_nonsense_is_left_out() {
        let armed = parse("a=abort, b@3=error,c,d=later,e=stop");
        let names: Vec<_> = armed.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "e"]);
        assert_eq!(armed[1].passage, 3);
    }

    #[test]
    fn only_the_named_passage_has_an_effect() {
        let armed = parse("b@2=error");
        let effects: Vec<_> = (0..3).map(|_| effect_of(&armed, "b")).collect();
        assert_eq!(effects, [None, Some(FailpointEffect::Error), None]);
        assert_eq!(effect_of(&armed, "other"), None);
    }
}
