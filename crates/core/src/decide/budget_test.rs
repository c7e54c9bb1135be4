//! Budgets through `decide` and `apply`.

use fermata_protocol::Code;
use fermata_protocol::budget::Budget;
use fermata_protocol::budget::Usage;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::ProjectConfig;
use fermata_protocol::supervision::Supervision;

use super::model::*;
use crate::command::Command;
use crate::effect::Effect;

fn usage(tokens: u64) -> Usage {
    Usage { input_tokens: tokens, output_tokens: 0, cost_micro_usd: 0 }
}

fn set(config: &ProjectConfig) -> Command {
    Command::Set { description: None, phase: None, config: Some(config.clone()) }
}

/// Reports usage; returns whether a pause follows.
fn pauses(model: &mut Model, agent: u8, tokens: u64) -> bool {
    model.tell(Command::Use { agent: name(agent), usage: usage(tokens) }).expect("accepted");
    let asked = model.pending.contains(&Effect::PauseForBudget {});
    model.settle();
    asked
}

fn resume(model: &mut Model, over_budget: bool) -> Result<(), fermata_protocol::Refusal> {
    let (operation, respawn) = (model.operation(), model.respawns(false));
    model.tell(Command::Resume { operation, respawn, over_budget })
}

#[test]
fn a_budget_that_is_reached_pauses_and_a_resume_needs_more_of_it() {
    let mut model = Model::new();
    let budget = Budget { tokens: Some(100), ..Budget::default() };
    let config = ProjectConfig { budget, ..ProjectConfig::default() };
    model.tell(set(&config)).expect("accepted");
    for agent in [0, 1] {
        let mut spec = spec(agent);
        spec.supervision = Default::default();
        let new = model.new_run();
        model.tell(Command::Run { agent: name(agent), spec, new }).expect("it may run");
        model.settle();
    }
    assert!(!pauses(&mut model, 0, 60));
    // The usage of a removed agent still counts.
    let run = model.run_of(&name(0)).expect("it runs");
    model.end(&run, 0);
    model.report_end(name(0), run);
    model.settle();
    model.tell(Command::RemoveAgent { agent: name(0) }).expect("it has ended");
    assert!(pauses(&mut model, 1, 40));
    let (operation, cause) = (model.operation(), PauseCause::TokenBudget);
    let pause = Command::Pause { operation, cause, reason: None, mode: PauseMode::Freeze, grace_ms: None };
    model.tell(pause).expect("it is active");
    model.settle();
    // A late report requests no other pause.
    assert!(!pauses(&mut model, 1, 1));
    assert_eq!(resume(&mut model, false).expect_err("the budget is reached").code, Code::BudgetExceeded);
    resume(&mut model, true).expect("a person wants it");
    model.settle();
    assert!(!pauses(&mut model, 1, 50), "it is waived");
    model.tell(set(&config)).expect("accepted");
    assert!(pauses(&mut model, 1, 1), "a new budget is not waived");
    assert_eq!(model.project.counters.removed_usage, usage(60));
}

fn two_agents(budgets: [Budget; 2]) -> Model {
    let mut model = Model::new();
    for (agent, budget) in [0, 1].into_iter().zip(budgets) {
        let mut spec = spec(agent);
        *spec.supervision = Supervision { budget, ..Supervision::default() };
        let new = model.new_run();
        model.tell(Command::Run { agent: name(agent), spec, new }).expect("it may run");
        model.settle();
    }
    model
}

fn tokens(bound: u64) -> Budget {
    Budget { tokens: Some(bound), ..Budget::default() }
}

fn asks_with(model: &mut Model, budget: Budget) -> bool {
    model.tell(set(&ProjectConfig { budget, ..ProjectConfig::default() })).expect("accepted");
    let asked = model.pending.contains(&Effect::PauseForBudget {});
    model.settle();
    asked
}

#[test]
fn the_own_budget_of_an_agent_that_has_ended_causes_no_pause() {
    let mut model = two_agents([tokens(10), Budget::default()]);
    assert!(pauses(&mut model, 0, 10));
    assert!(pauses(&mut model, 1, 1), "it is still not paused");
    let run = model.run_of(&name(0)).expect("it runs");
    model.end(&run, 0);
    model.report_end(name(0), run);
    model.settle();
    assert!(!pauses(&mut model, 1, 1));
    assert!(asks_with(&mut model, tokens(12)), "its usage counts for the project");
}

#[test]
fn a_budget_below_what_is_spent_already_pauses_at_once() {
    let mut model = two_agents([Budget::default(), Budget::default()]);
    assert!(!pauses(&mut model, 0, 60));
    assert!(!asks_with(&mut model, tokens(61)));
    assert!(asks_with(&mut model, tokens(60)));
}

#[test]
fn a_budget_that_is_reached_during_a_pause_is_asked_for_once() {
    let mut model = two_agents([tokens(10), Budget::default()]);
    let operation = model.operation();
    let mode = PauseMode::Freeze;
    let pause = Command::Pause { operation, cause: PauseCause::Person, reason: None, mode, grace_ms: None };
    model.tell(pause).expect("it is active");
    let ask = |model: &mut Model, tokens: u64| {
        model.pending.retain(|effect| *effect != Effect::PauseForBudget {});
        model.tell(Command::Use { agent: name(0), usage: usage(tokens) }).expect("accepted");
        model.pending.contains(&Effect::PauseForBudget {})
    };
    assert!(!ask(&mut model, 9));
    assert!(ask(&mut model, 1), "the pause may still be undone");
    assert!(!ask(&mut model, 1), "a pause was requested already");
    model.settle();
    assert!(!pauses(&mut model, 0, 1), "it is paused");
}
