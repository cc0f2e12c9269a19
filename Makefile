# The same commands for people and CI. ./dev does the work, so no make is needed.
.PHONY: demo test check fix test-gpu test-clients bench

demo:
	@./dev demo
test:
	@./dev test
check:
	@./dev check
fix:
	@./dev fix
test-gpu:
	@./dev test-gpu
bench:
	@./dev bench
test-clients:
	@./dev test-clients
