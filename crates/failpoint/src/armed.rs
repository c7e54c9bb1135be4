//! What a failpoint does in a build that has them: reads the list from the environment once, counts passages, and kills,
//! fails or stops at the passage that was asked for, or writes down every passage.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, raise};

/// The environment variable that names the file of failpoint events.
const EVENTS: &str = "FERMATA_FAILPOINT_EVENTS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Abort,
    Error,
    Stop,
    Tell,
}

#[derive(Debug)]
struct Armed {
    name: String,
    passage: u64,
    effect: Effect,
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
            "abort" => Effect::Abort,
            "error" => Effect::Error,
            "stop" => Effect::Stop,
            "tell" => Effect::Tell,
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

fn effect_of(armed: &[Armed], name: &str) -> Option<Effect> {
    let point = armed.iter().find(|point| point.name == name)?;
    let passage = point.passed.fetch_add(1, Ordering::Relaxed) + 1;
    (passage == point.passage || point.effect == Effect::Tell).then_some(point.effect)
}

pub fn hit(variable: &str, name: &str) {
    match effect_of(armed(variable), name) {
        Some(Effect::Abort) => abort(),
        Some(Effect::Stop) => stop(),
        Some(Effect::Tell) => tell(name),
        Some(Effect::Error) | None => {}
    }
}

pub fn check(variable: &str, name: &str) -> io::Result<()> {
    match effect_of(armed(variable), name) {
        Some(Effect::Abort) => abort(),
        Some(Effect::Error) => Err(io::Error::other(format!("failpoint {name}"))),
        Some(Effect::Stop) => {
            stop();
            Ok(())
        }
        Some(Effect::Tell) => {
            tell(name);
            Ok(())
        }
        None => Ok(()),
    }
}

fn stop() {
    // SIGSTOP cannot be refused; whoever goes on has been sent SIGCONT.
    let _refused = raise(Signal::SIGSTOP);
}

fn tell(name: &str) {
    let told = std::env::var_os(EVENTS).map(|path| {
        // One write, so that the lines of several threads and processes do not mix.
        OpenOptions::new().append(true).create(true).open(path)?.write_all(format!("{name}\n").as_bytes())
    });
    if !matches!(told, Some(Ok(()))) {
        eprintln!("failpoint {name}: nobody can be told: {told:?}");
    }
}

fn abort() -> ! {
    // SIGKILL cannot be caught, so that nothing is cleaned up; `abort` is for a kernel that would refuse it.
    let _refused = raise(Signal::SIGKILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_passage_is_told() {
        let armed = parse("a=tell");
        let effects: Vec<_> = (0..3).map(|_| effect_of(&armed, "a")).collect();
        assert_eq!(effects, [Some(Effect::Tell); 3]);
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
        assert_eq!(effects, [None, Some(Effect::Error), None]);
        assert_eq!(effect_of(&armed, "other"), None);
    }
}
